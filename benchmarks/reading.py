"""Reading in pieces against reading as a whole: `python -m benchmarks.reading` (half an hour).

Keys that are really generated, on the embedded model. Size and overlap of the pieces are
those of a prototype on other seeds. An interrupted run goes on where it was.
"""

from __future__ import annotations

from pathlib import Path

import longctx
from longctx.eval import sweep
from longctx.eval.tasks.passkey import Passkey

from ._measure import write_results

LENGTHS = (512, 1024, 2048, 4096)
PIECES = "chunk=180,overlap=48"
VARIANTS = ("none", *(f"read:{combine},{PIECES}" for combine in ("map", "nbce", "windows")))
SAMPLES, SEED = 100, 11


def main() -> None:
    """Sweep and write the table."""
    model, tokenizer = longctx.load("demo")
    found = sweep(
        model,
        tokenizer,
        Passkey(samples=SAMPLES, seed=SEED),
        LENGTHS,
        methods=VARIANTS,
        results=Path("build/reading/results.jsonl"),
    )
    rows: list[dict[str, object]] = []
    for variant in VARIANTS:
        cells = [row for row in found.rows if row.method == variant]
        shares = {
            f"{cell.length:,}": f"{cell.value:.0%} [{cell.low:.0%}, {cell.high:.0%}]"
            for cell in cells
        }
        rows.append({"read": variant, **shares})
    write_results(
        "Reading in pieces: keys found",
        "python -m benchmarks.reading",
        rows,
        f"Share of keys found, by tokens of the prompt: {SAMPLES} prompts a cell (seed {SEED}), "
        "embedded model, window 256. Wilson 95% intervals. Answers are generated in pieces, and "
        "scored where the prompt is read as a whole (none), which decides as greedy decoding does.",
    )


if __name__ == "__main__":
    main()
