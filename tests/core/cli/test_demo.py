"""What the demo says of its figures: those of the tables."""

from __future__ import annotations

import longctx
from longctx.cli.demo import _trained, _untrained  # pyright: ignore[reportPrivateUsage]
from longctx.eval import Passkey, Perplexity, SweepResult, sweep


def swept(model: str, methods: list[str], lengths: list[int]) -> SweepResult:
    loaded, tokenizer = longctx.load(model, device="cpu")
    tasks = [Passkey(samples=4), Perplexity(windows=2)]
    return sweep(loaded, tokenizer, tasks, lengths, methods=methods, progress=False)


def test_its_sentences_hold_the_figures_of_the_tables() -> None:
    before = swept("demo", ["none", "linear:8", "dual_chunk:8", "yarn:8"], [256, 512])
    after = swept("demo-tuned", ["none", "dual_chunk:2"], [512, 1024])
    said = _untrained(before)
    for length in (256, 512):
        assert f"{before.row('none', 'perplexity', length).value:.1f}" in said
    found = before.row("dual_chunk:8", "passkey", 512)
    assert found.far
    said_of_it = f"dual_chunk:8: {found.value:.0%} there, and {found.far_found} of {found.far}"
    assert f"The most are found by {said_of_it}" in said
    yarn = before.row("yarn:8", "passkey", 512)
    assert f"yarn:8, which plain transformers loads, finds {yarn.value:.0%} there" in said
    assert f"{yarn.far_found} of {yarn.far} keys that stand further back than 256" in said
    inside = before.row("yarn:8", "perplexity", 256).value
    assert f"at a perplexity of {inside:.1f} within the window" in said
    assert before.row("linear:8", "passkey", 512).far_found == 0
    said = _trained(before, after)
    assert f"{after.row('linear:8', 'passkey', 512).value:.0%} of the keys at 512 tokens" in said
    on_top = after.row("linear:8 + dual_chunk:2", "passkey", 1024)
    assert f"{on_top.value:.0%} read under linear:8 + dual_chunk:2" in said
