"""The command that compares decodings: `longctx decode-bench`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ..catalogue import entries
from .device_options import DeviceOptions

__all__ = ["COMMAND", "DecodeBench"]


def _settings() -> type[Any]:
    """The class of the options that say what is measured over."""
    from longctx.eval.decoding.settings import BenchSettings

    return BenchSettings


def _which(default: str) -> str:
    """What the help says after the decodings' description."""
    names = ", ".join(entry.name for entry in entries("longctx.generation.decodings", "DECODING"))
    return f"(default: {default}; there are {names})"


@dataclass(frozen=True, slots=True)
class DecodeBench:
    """Compare what models write under several decodings.

    Two tables: the model by itself on real text (perplexity, accuracy, teacher-forced repetition),
    once; and what it writes after real text under each decoding: repetition, loops, entropy, how
    alike continuations are, and whether keys are still found. The text's own figures stand beside
    them. Results are appended to OUT as they come: the same command goes on where an interrupted
    one was. OUT gets the figures as CSV and JSON, and a plot; `longctx report OUT` shows them.

    Examples:
        longctx decode-bench demo
        longctx decode-bench demo --decodings greedy dry sample:temperature=0.7 --out runs/bench
        longctx decode-bench base=smollm2 tuned=runs/tuned/model --decodings greedy contrastive:k=8
        longctx decode-bench smollm2 --text manual/ --prompts 200 --new-tokens 256
    """

    models: Positional[tuple[str, ...]]
    """Checkpoint folders (a saved patch in place), hub ids, GGUF files or "demo"; NAME=PATH names
    one."""
    decodings: Annotated[tuple[str, ...], arg(help_behavior_hint=_which)] = (
        "greedy",
        "sample:temperature=0.7",
        "dry",
        "contrastive",
    )
    """NAME or NAME:field=value,…, or a preset (translation, chat, retrieval): see
    `longctx decodings`."""
    out: Path = Path("decode-bench")
    """Folder for the results."""
    overwrite: bool = False
    """Replace a report there that holds more than this one, or has other settings."""
    batch_size: int = 10
    """Prompts at a time."""
    settings: Annotated[Any, arg(name="", constructor_factory=_settings)] = field(
        default_factory=lambda: _settings()()
    )
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Measure, print and write."""
        from longctx.eval import decode_bench, print_decode_bench, write_decode_bench
        from longctx.eval.decoding.bench import chosen_decodings, named_models
        from longctx.eval.reporting.bench_files import refuse_lost_bench

        from ..checkpoint import locate
        from ..folders import refuse_inside, refuse_other_than_folder

        refuse_other_than_folder(self.out)
        chosen_decodings(self.decodings)
        models = named_models(_named(self.models))
        for source in models.values():
            refuse_inside(self.out, locate(str(source)))
        if not self.overwrite:
            refuse_lost_bench(self.out, [*models], self.decodings, self.settings)
        result = decode_bench(
            models,
            self.decodings,
            self.settings,
            out=self.out,
            batch_size=self.batch_size,
            load=self.device_options.load,
        )
        print_decode_bench(result)
        paths = write_decode_bench(result, self.out, overwrite=self.overwrite)
        print(f"{', '.join(path.name for path in paths)} and the results are in {self.out}")
        return 0


def _named(models: tuple[str, ...]) -> dict[str, str] | tuple[str, ...]:
    """NAME=PATH apart from plain checkpoints, whose names follow from their folders.

    Raises:
        RunError: two of one name.
    """
    from longctx.eval.decoding.bench import name_of

    from ..errors import RunError

    found: dict[str, str] = {}
    for text in models:
        name, equals, source = text.partition("=")
        if not equals or "/" in name or not name or not source:  # "=" belongs to a folder's name
            name, source = name_of(text), text
        if name in found:
            raise RunError(f"two models are named {name!r}: write NAME=PATH for each.")
        found[name] = source
    return found


COMMAND = DecodeBench
