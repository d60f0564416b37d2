"""The command that measures: `longctx sweep`."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ..catalogue import entries
from ..errors import RunError
from .device_options import DeviceOptions
from .task_options import given_options, task_options, tasks_with

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from longctx.eval import SweepResult, Task

__all__ = ["COMMAND", "Sweep", "write"]


def _which(default: str) -> str:
    """What the help says after the tasks' description."""
    names = ", ".join(entry.name for entry in entries("longctx.eval.tasks", "TASK"))
    return f"(default: {default}; there are {names})"


def _task_options() -> type[Any]:
    """The class of the options that the tasks bring."""
    return task_options(Sweep, DeviceOptions)


@dataclass(frozen=True, slots=True)
class Sweep:
    """Measure retrieval and perplexity over lengths and methods.

    Results are appended to OUT/results.jsonl as they come: the same command goes on where an
    interrupted one was. OUT gets the table as CSV, JSON and parquet, the plot as PNG and SVG.

    Examples:
        longctx sweep demo --methods none linear:8 yarn:8 --lengths 256:2048
        longctx sweep smollm2 --methods none yarn:2 --lengths 4k,8k,12k,16k --samples 4
        longctx sweep smollm2-16k --tasks perplexity --text manual/ --lengths 1k:16k
        longctx sweep smollm2 --tasks needle multi_key:keys=8 lines --lengths 2k,4k
        longctx sweep demo --methods yarn:2 yarn:2+dual_chunk:factor=4,log_n=True --lengths 1k,2k
        longctx sweep demo --tasks passkey --methods none read:map,chunk=180 --lengths 1k,2k
        longctx sweep smollm2 --tasks longppl --evaluator better --lengths 8k --methods none yarn:2
        longctx sweep demo --tasks passkey --methods none yarn:4 --caches full sliding:512
        longctx sweep smollm2 --tasks passkey --caches full quantized:4 quantized:2 --lengths 2k
        longctx sweep smollm2 --tasks passkey --caches kvpress:SnapKVPress,compression_ratio=0.5
        longctx sweep longchat --tasks lines --file 200_lines.jsonl --lengths 8k
    """

    model: Positional[str]
    """Checkpoint folder (its saved patch in place), hub id, GGUF file, or "demo"."""
    methods: tuple[str, ...] = ("none",)
    """NAME:FACTOR or NAME:field=value,…, with a "+" between several that go on top of each other;
    "none" for the model as it comes, and read:map, read:nbce or read:windows for that model reading
    retrieval prompts in pieces."""
    caches: tuple[str, ...] = ("full",)
    """What contexts are kept in, under each method: "full", quantized:BITS, sliding:TOKENS, or a
    press of kvpress with its fields. Other than with "full", a context is prefilled without its
    question and compressed, and the rest is read over what is left."""
    lengths: str = ""
    """Tokens: FROM:TO doubles, or a list 4k,8k. Default: from a quarter of the window
    (at least 256) to twice it (at least 1k)."""
    tasks: Annotated[tuple[str, ...], arg(help_behavior_hint=_which)] = ("passkey", "perplexity")
    """What to measure: NAME or NAME:field=value,…: see `longctx tasks`. An option below that is for
    tasks goes to all that have such a field, unless they are given their own."""
    verify: int = 0
    """Answers per method and task that are generated too, to be compared with their scores."""
    adaptive: bool = False
    """Stop asking a cell once it is decided (80% of the keys or not), bisecting over lengths. With
    few samples wrong decisions are likely, and it says how likely; 100 keep them at 5%."""
    out: Path = Path("sweep")
    """Folder for the results."""
    overwrite: bool = False
    """Replace a report there that holds more than this one."""
    replace: bool = False
    """Let methods replace the RoPE scaling that the checkpoint ships with."""
    batch_tokens: int = 16_384
    """Tokens forwarded at a time; halved on out-of-memory."""
    task_options: Annotated[Any, arg(name="", constructor_factory=_task_options)] = field(
        default_factory=lambda: _task_options()()
    )
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load, sweep, print and write."""
        from longctx.eval import parse_lengths, print_sweep
        from longctx.eval.results.variants import parse_variant
        from longctx.eval.running.runner import Ranks

        from ..checkpoint import locate
        from ..folders import refuse_inside, refuse_other_than_folder
        from ..scoring.compressed_caches import parse_cache

        refuse_other_than_folder(self.out)
        if not self.methods:
            raise RunError("--methods names none: leave it out, or write --methods none.")
        for method in self.methods:
            parse_variant(method)
        if not self.caches:
            raise RunError("--caches names none: leave it out, or write --caches full.")
        for cache in self.caches:
            parse_cache(cache)
        self.chosen()
        if self.lengths:
            parse_lengths(self.lengths)
        refuse_inside(self.out, locate(self.model))
        model, tokenizer = self.device_options.load(self.model)
        result = self.sweep(model, tokenizer)
        if not Ranks.here().first:  # it reports for all
            return 0
        print_sweep(result)
        return write(result, self.out, overwrite=self.overwrite)

    def sweep(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> SweepResult:
        """Measure a model that is loaded."""
        from longctx.eval import Adaptive, sweep

        from ..model import window

        known = window(model) or 4096
        first = max(known // 4, 256)
        return sweep(
            model,
            tokenizer,
            self.chosen(),
            self.lengths or f"{first}:{max(known * 2, first * 4)}",
            methods=self.methods,
            caches=self.caches,
            results=self.out / "results.jsonl",
            batch_tokens=self.batch_tokens,
            verify=self.verify,
            adaptive=Adaptive() if self.adaptive else None,
            replace=self.replace,
            overwrite=self.overwrite,
        )

    def chosen(self) -> list[Task]:
        """The tasks at these settings."""
        from ..registry import parse_fields

        own = dict(
            parse_fields(text, example="needle:samples=5", error=RunError) for text in self.tasks
        )
        if len(own) < len(self.tasks):
            raise RunError("a task is asked for twice: one sweep for each setting.")
        given = given_options(self.task_options)
        for option in given:
            _refuse_idle(option, tasks_with(option), own)

        from longctx.eval.tasks.shared.answering import Answering
        from longctx.eval.tasks.shared.registry import available_tasks, make_task, task_class
        from longctx.eval.tasks.shared.retrieval import Retrieval

        chosen = [
            make_task(name, {k: v for k, v in given.items() if name in tasks_with(k)} | fields)
            for name, fields in own.items()
        ]
        for option, kinds in (("verify", (Retrieval, Answering)), ("adaptive", (Retrieval,))):
            if getattr(self, option):
                having = [n for n in available_tasks() if issubclass(task_class(n), kinds)]
                _refuse_idle(option, having, own)
        return chosen


def _refuse_idle(option: str, tasks: Sequence[str], chosen: Container[str]) -> None:
    """Refuse an option that none of the chosen tasks has."""
    if not any(task in chosen for task in tasks):
        raise RunError(
            f"--{option.replace('_', '-')} is for the tasks {', '.join(tasks)}: add one to "
            "--tasks, or leave it out."
        )


def write(result: SweepResult, out: Path, *, overwrite: bool) -> int:
    """Write a sweep's files and return the exit code: 1 if a cell failed or is not as scored."""
    from longctx.eval import write_sweep

    paths = write_sweep(result, out, overwrite=overwrite)
    print(f"{', '.join(path.name for path in paths)} and results.jsonl are in {out}")
    unlike = any(check.disagreements for check in result.verified)
    return 1 if unlike or any(row.failed for row in result.rows) else 0


COMMAND = Sweep
