"""Engines that are libraries, asked in their own Python for a prompt's log-probabilities.

LONGCTX_MLX           a Python with mlx-lm (on Linux: mlx[cpu])
LONGCTX_CTRANSLATE2   a Python with ctranslate2, transformers and torch, which its converter needs
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from longctx.errors import RunError

from ._servers import python_of

__all__ = ["LIBRARIES", "Library", "NotLoadedError", "loaded"]

_MLX = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
model, _ = load_model(Path(sys.argv[1]))
for line in sys.stdin:
    ids = json.loads(line)
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    print(json.dumps([found[i - 1, ids[i]].item() for i in range(1, len(ids))]), flush=True)
"""
_CTRANSLATE2 = """
import json, sys
import ctranslate2, numpy
from ctranslate2.converters import TransformersConverter
TransformersConverter(sys.argv[1]).convert(sys.argv[2], quantization="float32")
model = ctranslate2.Generator(sys.argv[2], device="cpu", compute_type="float32")
for line in sys.stdin:
    ids = json.loads(line)
    found = numpy.array(model.forward_batch([ids], return_log_probs=True))[0]
    print(json.dumps([float(found[i - 1, ids[i]]) for i in range(1, len(ids))]), flush=True)
"""
LIBRARIES = {"mlx-lm": _MLX, "ctranslate2": _CTRANSLATE2}
"""What each library's Python runs on two folders, the checkpoint's and one for itself: a line of
ids in, a line of log-probabilities out."""


class NotLoadedError(RunError):
    """The library does not load the checkpoint, and says so."""


@dataclass(frozen=True, slots=True)
class Library:
    """A client as those of servers are, of a library that holds a checkpoint."""

    engine: str
    process: subprocess.Popen[str]
    log: IO[str]
    """What the process says on stderr."""

    def window(self) -> int | None:
        """These keep to none."""
        return None

    def tokenize(self, text: str) -> list[int] | None:
        """They take ids."""
        del text
        return None

    def logprobs(self, ids: Sequence[int], places: Sequence[int]) -> Tensor:
        """Log-probabilities of the tokens at some places, read in one pass, float64 [N].

        Raises:
            NotLoadedError: with the library's last line.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps([*ids]), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.log.seek(0)
            said = self.log.read().strip().splitlines()
            raise NotLoadedError(f"{self.engine}: {said[-1] if said else 'it ended'}")
        found: list[float] = json.loads(answer)
        return torch.tensor([found[place - 1] for place in places], dtype=torch.float64)


@contextmanager
def loaded(engine: str, folder: Path) -> Generator[Library]:
    """A library with a checkpoint, until the block ends."""
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryFile("w+") as log:
        words = [str(python_of(engine)), "-c", LIBRARIES[engine], str(folder), f"{own}/model"]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            yield Library(engine, process, log)
        finally:
            process.kill()
            process.communicate()
