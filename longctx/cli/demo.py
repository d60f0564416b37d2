"""The command that shows it all on the embedded model: `longctx demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .device_options import DeviceOptions
from .sweep import Sweep, write

if TYPE_CHECKING:
    from longctx.eval import SweepResult

__all__ = ["COMMAND", "Demo"]

_METHODS = ("linear", "ntk", "yarn", "dynamic")
_LENGTHS = "256:2048"


@dataclass(frozen=True, slots=True)
class Demo:
    """Extend and measure the embedded model in about three minutes.

    It has 0.9 M parameters and a window of 256 tokens. Methods none, linear, ntk, yarn and dynamic
    at factors 2, 4 and 8, and alibi (which has no factor), at 256 to 2,048 tokens: passkey and
    perplexity, table and plot. Then the same model
    under linear:8 after fine-tuning, which ships with the package; with --train it is trained
    before your eyes instead, which takes about eight minutes on two cores.

    Examples:
        longctx demo
        longctx demo --train
    """

    train: bool = False
    """Fine-tune the embedded model now, and measure it before and after."""
    samples: int = 20
    """Passkey prompts per method and length."""
    out: Path = Path("longctx-demo")
    """Folder for the results."""
    overwrite: bool = False
    """Replace a report there of other settings."""

    def run(self) -> int:
        """Sweep the embedded model, extended and fine-tuned, and say what the figures say."""
        from ..folders import refuse_other_than_folder

        refuse_other_than_folder(self.out)
        methods = [f"{name}:{factor}" for name in _METHODS for factor in (2, 4, 8)]
        before, code = self._swept("demo", ["none", *methods, "alibi"], self.out)
        print(_untrained(before))
        tuned = self._trained() if self.train else "demo-tuned"
        folder = self.out / ("trained" if self.train else "tuned")
        after, code_after = self._swept(tuned, ["none"], folder)
        print(_trained(before, after))
        return max(code, code_after)

    def _swept(self, model: str, methods: list[str], out: Path) -> tuple[SweepResult, int]:
        from longctx.eval import print_sweep

        command = Sweep(
            model=model,
            methods=tuple(methods),
            lengths=_LENGTHS,
            # One that is trained now has the template that it was trained with.
            tasks=(f"passkey:samples={self.samples},chat=False", "perplexity"),
            out=out,
            overwrite=self.overwrite,
            device_options=DeviceOptions(device="cpu"),
        )
        result = command.sweep(*command.device_options.load(model))
        print_sweep(result)
        return result, write(result, out, overwrite=self.overwrite)

    def _trained(self) -> str:
        """The folder of a model trained now, or gone on with where it was interrupted."""
        from longctx.train.recipes import EMBEDDED
        from longctx.train.run import Run

        folder = self.out / "train"
        if not (folder / "model").exists():
            run = Run(EMBEDDED, ("manual", "sample"), folder, template="vicuna")
            model, tokenizer = DeviceOptions(device="cpu").load("demo")
            run.extend(model)
            run.start(model, tokenizer, resume=True)
        return str(folder / "model")


def _value(result: SweepResult, method: str, task: str, length: int) -> float:
    return result.row(method, task, length).value


def _untrained(result: SweepResult) -> str:
    """Say in two sentences what extension without training does, as far as it was measured."""
    first, last = result.lengths[0], result.lengths[-1]
    extended = [variant.label for variant in result.variants if variant.method is not None]
    rows = [row for row in result.rows if row.method in extended and row.length == last]
    calm = min((r.value, r.method) for r in rows if r.task == "perplexity" and not r.failed)
    found = max(r.value for r in rows if r.task == "passkey" and not r.failed)
    said = (
        f"Read to {last:,} tokens, {last // first} times its window, the unpatched model goes from "
        f"perplexity {_value(result, 'none', 'perplexity', first):.1f} to "
        f"{_value(result, 'none', 'perplexity', last):.1f} and from "
        f"{_value(result, 'none', 'passkey', first):.0%} of the keys to "
        f"{_value(result, 'none', 'passkey', last):.0%}. Without any training {calm[1]} holds the "
        f"perplexity best ({calm[0]:.1f} there), and no method finds more than {found:.0%} of the "
        "keys at that length"
    )
    if found >= 0.5:
        return f"{said}."
    return (
        f"{said}: perplexity does not tell of retrieval, and reading further takes fine-tuning on "
        "the patched positions."
    )


def _trained(before: SweepResult, after: SweepResult) -> str:
    """Say what fine-tuning does."""
    last = after.lengths[-1]
    was, now = (
        [_value(result, method, task, last) for task in ("passkey", "perplexity")]
        for result, method in ((before, "linear:8"), (after, after.variants[0].label))
    )
    return (
        f"Fine-tuned under linear:8, the same model finds {now[0]:.0%} of the keys at {last:,} "
        f"tokens, where it found {was[0]:.0%} before, at a perplexity of {now[1]:.1f} instead of "
        f"{was[1]:.1f}."
    )


COMMAND = Demo
