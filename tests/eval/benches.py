"""Folders of decode benches that no model was run for, as `longctx decode-bench` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longctx.eval import BenchSettings, DecodeBench, write_decode_bench
from longctx.eval.decoding.result import TEXT, Figure, LoopExample

from .runs import NASTY

FIGURES = {
    **{f"seq-rep-{n}": Figure(0.5 / n, 0.4 / n, 0.6 / n) for n in (1, 2, 3, 4)},
    "different tokens": Figure(40.25, 30.5, 50.5),
    "uniq-seq": Figure(1234.0, 1100.0, 1368.0),
    "loops": Figure(0.25, 0.125, 0.5),
    "entropy": Figure(7.0, 6.5, 7.5),
    "cross-BLEU": Figure(0.3125, -0.0625, 0.75),
}
DECODINGS = ("greedy", "sample:temperature=1,top_p=0.9", "sample:temperature=0.5", "dry")


def bench_of(model: str = "tiny", decodings: Sequence[str] = DECODINGS) -> DecodeBench:
    """A bench with the same figures for all decodings, and a hostile loop."""
    block = {"ppl": Figure(20.5, 18.0, 23.0), "accuracy": Figure(0.5), "wrep/16": Figure(0.125)}
    own = {**FIGURES, "keys": Figure(1.0, 0.875, 1.0)}
    examples = (
        LoopExample("a.txt", "p" * 300, f"\u202e{NASTY}\n", "again and again "),
        LoopExample("b.txt", "short", "", NASTY),
    )
    return DecodeBench(
        model,
        BenchSettings(prompts=4),
        4,
        2,
        block,
        {TEXT: FIGURES, **dict.fromkeys(decodings, own)},
        {"model": "0123456789abcdef"},
        {decodings[0]: examples},
    )


def write_bench(folder: Path, *models: str) -> None:
    """A folder of a bench, one a model."""
    write_decode_bench([bench_of(model) for model in models or ("tiny",)], folder)
