"""The command that measures: `longctx sweep`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from tyro.conf import Positional, arg

from ..errors import RunError
from .device_options import DeviceOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from longctx.eval import SweepResult, Task

__all__ = ["Sweep", "write"]

TaskName: TypeAlias = Literal[
    "passkey",
    "perplexity",
    "needle",
    "lines",
    "topics",
    "multi_key",
    "multi_value",
    "variable_tracking",
    "repetition",
]

_HIDDEN = ("passkey", "multi_key", "multi_value", "variable_tracking")
_ANSWERED = (*_HIDDEN, "needle", "lines", "topics")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "samples": _ANSWERED,
    "chat": _ANSWERED,
    "share_lengths": _ANSWERED,
    "verify": _ANSWERED,
    "adaptive": _ANSWERED,
    "seed": (*_ANSWERED, "repetition"),
    "text": (*_HIDDEN, "needle", "perplexity", "repetition"),
    "windows": ("perplexity", "repetition"),
    "stride": ("perplexity",),
    "new_tokens": ("repetition",),
    "haystack": _HIDDEN,
    "needle": ("needle",),
    "question": ("needle",),
    "answer": ("needle",),
    "lines_file": ("lines",),
    "topics_file": ("topics",),
}
"""The tasks that an option has an effect on."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Measure retrieval and perplexity over lengths, under several methods.

    Results are appended to OUT/results.jsonl as they come: the same command goes on where an
    interrupted one was. OUT gets the table as CSV, JSON and parquet, the plot as PNG and SVG.
    LongPPL is for Python: longctx.eval.key_tokens and long_ppl, over SweepResult.per_token().

    Examples:
        longctx sweep demo --methods none linear:8 yarn:8 --lengths 256:2048
        longctx sweep smollm2 --methods none yarn:2 --lengths 4k,8k,12k,16k --samples 4
        longctx sweep smollm2-16k --tasks perplexity --text manual/ --lengths 1k:16k
        longctx sweep smollm2 --tasks needle multi_key lines topics --lengths 2k,4k
        longctx sweep longchat --tasks lines --lines-file 200_lines.jsonl --lengths 8k
    """

    model: Positional[str]
    """Checkpoint folder (its saved patch in place), hub id, GGUF file, or "demo"."""
    methods: tuple[str, ...] = ("none",)
    """NAME:FACTOR or NAME:field=value,…, and "none" for the model as it comes."""
    lengths: str = ""
    """Tokens: FROM:TO doubles, or a list 4k,8k. Default: from a quarter of the window
    (at least 256) to twice it (at least 1k)."""
    tasks: tuple[TaskName, ...] = ("passkey", "perplexity")
    """What to measure: perplexity of text, repetition in what a model writes, or whether it finds
    again what a prompt of that length hides."""
    samples: int = 20
    """Prompts per method, retrieval task and length."""
    windows: int = 10
    """Windows of text at most, for perplexity and repetition, each within one document."""
    new_tokens: int = 256
    """Tokens to generate after each prompt of repetition."""
    haystack: Literal["grass", "text", "both"] = "both"
    """What keys and variables are hidden in: the classical sentences, real text, or in turn."""
    text: tuple[str, ...] = ()
    """Text files or folders, a document per file; default: the embedded held-out documents."""
    needle: tuple[str, ...] = ()
    """Sentences to hide in real text, one to a prompt; default: the one about San Francisco."""
    question: tuple[str, ...] = ()
    """A question for each needle."""
    answer: tuple[str, ...] = ()
    """An answer to each question, best in the needle's words."""
    lines_file: str = ""
    """LongEval's published test file for task lines; default: generated prompts."""
    topics_file: str = ""
    """LongEval's published test file for task topics; default: generated prompts."""
    stride: int | None = None
    """Score the same perplexity targets at every length, in windows this many tokens apart."""
    seed: int = 0
    """Chooses keys and haystacks."""
    chat: bool | None = None
    """Put prompts into the tokenizer's chat template; default: if it has one."""
    share_lengths: bool = False
    """Let all lengths share keys and haystacks: cheaper, but they are no longer independent."""
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
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load, sweep, print and write."""
        from longctx.eval import parse_lengths, print_sweep
        from longctx.eval.running.runner import Ranks

        from ..folders import refuse_other_than_folder
        from ..registry import parse_method

        refuse_other_than_folder(self.out)
        for method in self.methods:
            parse_method(method)
        self._chosen()
        if self.lengths:
            parse_lengths(self.lengths)
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
            self._chosen(),
            self.lengths or f"{first}:{max(known * 2, first * 4)}",
            methods=self.methods,
            results=self.out / "results.jsonl",
            batch_tokens=self.batch_tokens,
            verify=self.verify,
            adaptive=Adaptive() if self.adaptive else None,
            replace=self.replace,
            overwrite=self.overwrite,
        )

    def _chosen(self) -> list[Task]:
        """The tasks at these settings."""
        from longctx.eval import (
            Lines,
            MultiKey,
            MultiValue,
            Needle,
            Passkey,
            Perplexity,
            Repetition,
            Topics,
            VariableTracking,
        )

        if self.adaptive and (self.lines_file or self.topics_file):
            raise RunError("--adaptive draws its own prompts: leave it out, or the test file.")
        for option, tasks in _OPTIONS.items():
            default: Any = type(self).__dataclass_fields__[option].default
            if getattr(self, option) != default and not {*tasks} & {*self.tasks}:
                raise RunError(
                    f"--{option.replace('_', '-')} is for the tasks {', '.join(tasks)}: add one to "
                    "--tasks, or leave it out."
                )
        if self.share_lengths and (self.lines_file or self.topics_file):
            raise RunError(
                "--share-lengths is for prompts that are drawn, those of a test file are as they "
                "are: leave it out, or sweep the file by itself."
            )
        drawn: dict[str, Any] = {
            "samples": self.samples,
            "seed": self.seed,
            "share_lengths": self.share_lengths,
            "chat": self.chat,
        }
        hidden: dict[str, Any] = {**drawn, "haystack": self.haystack, "text": self.text}
        asked: dict[str, Any] = {
            "needle": self.needle,
            "question": self.question,
            "answer": self.answer,
        }
        if not any(asked.values()):
            asked = {}  # all three at their defaults
        settings: dict[TaskName, Callable[[], Task]] = {
            "passkey": lambda: Passkey(**hidden),
            "perplexity": lambda: Perplexity(
                windows=self.windows, stride=self.stride, text=self.text
            ),
            "needle": lambda: Needle(**drawn, text=self.text, **asked),
            "lines": lambda: Lines(**drawn, file=self.lines_file),
            "topics": lambda: Topics(**drawn, file=self.topics_file),
            "multi_key": lambda: MultiKey(**hidden),
            "multi_value": lambda: MultiValue(**hidden),
            "variable_tracking": lambda: VariableTracking(**hidden),
            "repetition": lambda: Repetition(
                new_tokens=self.new_tokens, windows=self.windows, seed=self.seed, text=self.text
            ),
        }
        return [settings[name]() for name in self.tasks]


def write(result: SweepResult, out: Path, *, overwrite: bool) -> int:
    """Write a sweep's files and return the exit code: 1 if a cell failed or is not as scored."""
    from longctx.eval import write_sweep

    paths = write_sweep(result, out, overwrite=overwrite)
    print(f"{', '.join(path.name for path in paths)} and results.jsonl are in {out}")
    unlike = any(check.disagreements for check in result.verified)
    return 1 if unlike or any(row.failed for row in result.rows) else 0
