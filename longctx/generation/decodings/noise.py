"""Noise: greedy decoding of logits, or of embeddings, with Gaussian noise on them.

    logits + sd · ε,  or  embedding + sd · rms · ε,  ε ~ N(0, 1)

Noise on embeddings goes to generated tokens alone: the prompt is read as it is. Each row's noise
follows from the seed, the row's index and, for embeddings, the token's place, not from the batch.

When to use it: to see how firmly a model holds its text, or to leave a loop. Noise on logits is a
cruder kind of sampling, which also lifts tokens that the model excludes.

Source: Jain et al. 2023, NEFTune (arXiv:2310.05914), for noise on embeddings (there in training).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from ...errors import RunError
from ..checks import check_number
from ..decoding import Call, Decoding

__all__ = ["DECODING", "Noise"]


@dataclass(frozen=True, slots=True)
class Noise(Decoding):
    """Greedy under Gaussian noise."""

    sd: float = 0.5
    """Standard deviation: of logits in nats; of embeddings as a share of the root mean square of
    the embedding table."""
    where: Literal["logits", "embeddings"] = "logits"
    """What the noise is added to."""

    name: ClassVar[str] = "noise"
    keeps_keys: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number(self.name, "sd", self.sd, least=0, most=1000, above=True)
        if self.where not in ("logits", "embeddings"):
            raise RunError(f"noise: where={self.where!r}: expected 'logits' or 'embeddings'.")

    @property
    def draws(self) -> bool:
        """The noise is drawn."""
        return True

    def processors(self, call: Call) -> Sequence[LogitsProcessor]:
        """Noise on logits, where that is asked for."""
        return (_LogitNoise(call, self.sd),) if self.where == "logits" else ()

    def around(self, call: Call) -> AbstractContextManager[object]:
        """Noise on embeddings, where that is asked for."""
        return _noisy(call, self.sd) if self.where == "embeddings" else nullcontext()


class _LogitNoise(LogitsProcessor):
    def __init__(self, call: Call, sd: float) -> None:
        self._call = call
        self._sd = sd

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        places = input_ids.shape[1] - self._call.firsts
        drawn = [
            _drawn(seed, int(place), scores.shape[-1])
            for seed, place in zip(self._call.seeds, places, strict=True)
        ]
        return scores + self._sd * torch.stack(drawn).to(scores)


def _drawn(seed: int, place: int, size: int) -> Tensor:
    """Noise [size] of one place of one row."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + place) % (1 << 63))
    return torch.randn(size, generator=generator, dtype=torch.float64)


@contextmanager
def _noisy(call: Call, sd: float) -> Generator[None]:
    """Add noise to the embeddings of generated tokens inside the block."""
    table: Any = call.model.get_input_embeddings()
    scale = sd * float(table.weight.detach().float().pow(2).mean().sqrt())
    read = 0

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        nonlocal read
        del module, args
        rows, count, size = output.shape
        noise = torch.zeros(output.shape, dtype=torch.float64)
        for row in range(rows):
            first, start = int(call.firsts[row]), int(call.starts[row])
            for index in range(max(start - read, 0), count):
                noise[row, index] = _drawn(call.seeds[row], read + index - first, size)
        read += count
        return output + scale * noise.to(output)

    handle = table.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


DECODING = Noise
