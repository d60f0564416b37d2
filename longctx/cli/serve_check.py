"""The command that holds a running server against a checkpoint: `longctx serve-check`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from .device_options import DeviceOptions

if TYPE_CHECKING:
    from ..serving.check import Checked
    from ..serving.check_text import CheckedText

__all__ = ["COMMAND", "ServeCheck"]

_POSITIONS = 24  # of a prompt, where each costs a request
_LONGEST = 10**6  # seconds; sockets know no longer wait than some weeks


@dataclass(frozen=True, slots=True)
class ServeCheck:
    """Hold a running server's log-probabilities against a checkpoint's.

    Exit code 0 if the server computes this checkpoint, 1 if not: the faults are named, a dropped
    scaling, a wrong window, temperature or tokenizer and half precision by those names. llama.cpp
    scores no prompts, so single positions are asked for; transformers serve gives text alone, so
    greedy answers are compared.

    Examples:
        longctx serve-check demo-1k --url http://127.0.0.1:8000 --engine vllm
        longctx serve-check smollm2-16k --url http://127.0.0.1:8080 --engine llama.cpp --positions 8
    """

    model: Positional[str]
    """Checkpoint folder, hub id, or "demo": what the server should compute."""
    url: str
    """The server's address, such as http://127.0.0.1:8000."""
    engine: Literal["vllm", "sglang", "llama.cpp", "transformers"]
    """Which engine it is."""
    lengths: tuple[int, ...] = ()
    """Tokens of the prompts; default: 1 and 2 times the old window, and the window less one."""
    positions: int | None = None
    """Tokens of each prompt that are compared; default: all, and 24 with llama.cpp."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the server computes in. Half precision is held against our own run in it."""
    seed: int = 0
    """Which stretch of text the prompts are."""
    timeout: float = 600.0
    """Seconds to wait for one whole answer."""
    out: Path | None = None
    """A JSON file for the figures."""
    overwrite: bool = False
    """Replace that file."""
    device: str = "auto"
    """Where longctx computes: "auto" takes a GPU if there is one; or cuda:0, cpu."""

    def run(self) -> int:
        """Ask, compute, compare."""
        from ..checkpoint import locate
        from ..errors import RunError, printable
        from ..files import write_whole
        from ..folders import refuse_taken_file
        from ..serving.check import CheckSettings, check_server
        from ..serving.check_text import check_text
        from ..serving.clients import Transformers, check_url, client_of

        if self.positions is not None and self.positions < 1:
            raise RunError(f"--positions {self.positions}: expected 1 or more.")
        if self.out is not None:
            refuse_taken_file(self.out, self.overwrite)
        if not 0 < self.timeout <= _LONGEST:
            raise RunError(
                f"--timeout {self.timeout}: expected seconds above 0, and at most {_LONGEST:,}."
            )
        check_url(self.url)  # before the model takes its time to load
        options = DeviceOptions(device=self.device, dtype="float32")
        model, tokenizer = options.load(self.model)
        embeddings: Any = model.get_input_embeddings()
        vocabulary = int(embeddings.weight.shape[0])
        client = client_of(self.engine, self.url, vocabulary=vocabulary, seconds=self.timeout)
        positions = self.positions
        if positions is None and self.engine == "llama.cpp":
            positions = _POSITIONS
        settings = CheckSettings(self.lengths, positions, self.dtype, self.seed)
        if isinstance(client, Transformers):
            found = check_text(
                model, tokenizer, client, settings, served_as=str(locate(self.model)), say=_say
            )
        else:
            found = check_server(model, tokenizer, client, settings, say=_say)
        print(printable(found))
        if self.out is not None:
            write_whole(self.out, lambda part: part.write_text(_as_json(found)))
        return 0 if found.ok else 1


def _as_json(found: Checked | CheckedText) -> str:
    """The figures, with whether all is well."""
    from ..files import finite

    return json.dumps(finite({**asdict(found), "ok": found.ok}), indent=2) + "\n"


def _say(text: str) -> None:
    print(f"serve-check: {text}", file=sys.stderr, flush=True)


COMMAND = ServeCheck
