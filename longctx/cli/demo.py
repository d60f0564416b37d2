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

_PLAIN = "yarn:8"
"""Of those that plain transformers loads, the one that reads furthest without training."""
_METHODS = (
    "none",
    "linear:8",
    "yarn:2",
    "yarn:4",
    _PLAIN,
    "dynamic:4",
    "sink_window:window=192",
    "rerope:factor=8,window=64,log_n=True",
    "dual_chunk:factor=8,log_n=True",
)
_FURTHER = "dual_chunk:factor=2,log_n=True"
"""On top of the fine-tuned model's own method."""
_LENGTHS = "256:2048"
_TUNED_LENGTHS = "256:4096"


@dataclass(frozen=True, slots=True)
class Demo:
    """Extend and measure the embedded model in about three minutes.

    It has 0.9 M parameters and a window of 256 tokens. Frequency methods, yarn among them at
    several factors, sinks with a window, and two methods that change distances, all without
    training, at 256 to 2,048 tokens: passkey and perplexity, table and plot. Then the same model
    under linear:8 after fine-tuning to 2,048 tokens, which ships with the package, at up to 4,096
    tokens, alone and with dual chunk attention on top; with --train it is trained before your eyes
    instead, which takes about eight minutes on two cores.

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
        before, code = self._swept("demo", _METHODS, _LENGTHS, self.out)
        print(_untrained(before))
        tuned = self._trained() if self.train else "demo-tuned"
        folder = self.out / ("trained" if self.train else "tuned")
        after, code_after = self._swept(tuned, ("none", _FURTHER), _TUNED_LENGTHS, folder)
        print(_trained(before, after))
        return max(code, code_after)

    def _swept(
        self, model: str, methods: tuple[str, ...], lengths: str, out: Path
    ) -> tuple[SweepResult, int]:
        from longctx.eval import print_sweep

        command = Sweep(
            model=model,
            methods=methods,
            lengths=lengths,
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
    """Say what extension without training does, as far as it was measured."""
    first, last = result.lengths[0], result.lengths[-1]
    labels = [variant.label for variant in result.variants if variant.methods]
    measured = {
        label: _value(result, label, "perplexity", last)
        for label in labels
        if not result.row(label, "perplexity", last).failed
    }
    far = {label: _far_keys(result, label) for label in labels}
    best = max(far, key=lambda label: far[label][0])
    calm = min(measured, key=lambda label: measured[label])
    inside = {label: _value(result, label, "perplexity", first) for label in ("none", _PLAIN)}
    found = {label: _value(result, label, "passkey", last) for label in ("none", *labels)}
    return (
        f"Read to {last:,} tokens, {last // first} times its window, the unpatched model goes from "
        f"perplexity {inside['none']:.1f} to {_value(result, 'none', 'perplexity', last):.1f} and "
        f"from {_value(result, 'none', 'passkey', first):.0%} of the keys to {found['none']:.0%}. "
        f"Without any training {_PLAIN}, which plain transformers loads, finds "
        f"{found[_PLAIN]:.0%} there, and {far[_PLAIN][0]} of {far[_PLAIN][1]} keys that stand "
        f"further back than {first:,} tokens, at a perplexity of {inside[_PLAIN]:.1f} within the "
        f"window. The most are found by {best}: {found[best]:.0%} there, and {far[best][0]} of "
        f"{far[best][1]}. The lowest perplexity at {last:,} tokens is that of {calm} "
        f"({measured[calm]:.1f}), which finds {far[calm][0]} of {far[calm][1]}: perplexity does "
        "not tell of retrieval. Methods that change distances show each key at one that the model "
        "was trained with; log_n keeps its attention sharp over more of them."
    )


def _trained(before: SweepResult, after: SweepResult) -> str:
    """Say what fine-tuning does, and what changed distances add to it."""
    learnt, last = before.lengths[-1], after.lengths[-1]
    own, further = (variant.label for variant in after.variants)
    was = _value(before, "linear:8", "passkey", learnt)
    return (
        f"Fine-tuned under linear:8, the same model finds "
        f"{_value(after, own, 'passkey', learnt):.0%} of the keys at {learnt:,} tokens, where it "
        f"found {was:.0%} before. At {last:,}, twice as far as it was trained, it finds "
        f"{_value(after, own, 'passkey', last):.0%}, and "
        f"{_value(after, further, 'passkey', last):.0%} read under {further}."
    )


def _far_keys(result: SweepResult, method: str) -> tuple[int, int]:
    """Keys found, of those that stand further back than the original window, at all lengths."""
    rows = [row for row in result.rows if (row.method, row.task) == (method, "passkey")]
    return sum(row.far_found or 0 for row in rows), sum(row.far or 0 for row in rows)


COMMAND = Demo
