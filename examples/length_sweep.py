r"""Measure how far a model reads under several methods, and test the differences.

    python examples/length_sweep.py
    python examples/length_sweep.py --model smollm2 --methods none yarn:2 linear:2 \
        --lengths 4k,8k,12k,16k --samples 100 --windows 20 --out runs/smollm2

Without options it measures the embedded model, in under a minute on two cores. Interrupted, the
same command goes on where it was. `longctx report runs/sweep` makes an HTML page of the results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import longctx
from longctx.eval import (
    Needle,
    Passkey,
    Perplexity,
    compare,
    print_comparison,
    print_sweep,
    sweep,
    write_sweep,
)


def main() -> None:
    """Sweep, print, write, compare."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="checkpoint folder, hub id or GGUF file")
    parser.add_argument("--methods", nargs="+", default=["none", "yarn:4", "dynamic:4"])
    parser.add_argument("--lengths", default="256:1024", help="FROM:TO doubles; or 4k,8k,12k")
    parser.add_argument("--samples", type=int, default=10, help="prompts per method and length")
    parser.add_argument("--windows", type=int, default=5, help="windows of text, for perplexity")
    parser.add_argument("--needle", action="store_true", help="hide a sentence in real text too")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder to write")
    args = parser.parse_args()

    model, tokenizer = longctx.load(args.model)
    result = sweep(
        model,
        tokenizer,
        [
            Passkey(samples=args.samples),
            Perplexity(windows=args.windows),
            *([Needle(samples=args.samples)] if args.needle else []),
        ],
        args.lengths,
        methods=args.methods,
        results=args.out / "results.jsonl",
    )
    print_sweep(result)
    print("\n".join(str(path) for path in write_sweep(result, args.out)))

    if len(args.methods) > 1:  # the first method is the baseline
        print_comparison(compare({"sweep": result}))


if __name__ == "__main__":
    try:
        main()
    except longctx.LongctxError as error:
        sys.exit(f"{error}")
