"""What the demo says of its figures: those of the tables."""

from __future__ import annotations

import longctx
from longctx.cli.demo import _trained, _untrained  # pyright: ignore[reportPrivateUsage]
from longctx.eval import Passkey, Perplexity, SweepResult, sweep


def swept(model: str, methods: list[str]) -> SweepResult:
    loaded, tokenizer = longctx.load(model, device="cpu")
    tasks = [Passkey(samples=2), Perplexity(windows=2)]
    return sweep(loaded, tokenizer, tasks, [256, 512], methods=methods, progress=False)


def test_its_sentences_hold_the_figures_of_the_tables() -> None:
    before, after = swept("demo", ["none", "linear:8"]), swept("demo-tuned", ["none"])
    said = _untrained(before)
    for method, length in (("none", 256), ("none", 512), ("linear:8", 512)):
        assert f"{before.row(method, 'perplexity', length).value:.1f}" in said
    said = _trained(before, after)
    assert f"{after.row('linear:8', 'passkey', 512).value:.0%} of the keys at 512 tokens" in said
    assert f"{after.row('linear:8', 'perplexity', 512).value:.1f} instead of" in said
    assert f"{before.row('linear:8', 'perplexity', 512).value:.1f}." in said
