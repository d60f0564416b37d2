"""A frequency method costs nothing: `python -m benchmarks.frequency`.

The patched forward runs the native model's operators (`tests/core/test_rope.py` compares the
lists), so the paired ratio of their times is 1 within its interval.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import longctx

from ._measure import paired_ratio, peak_memory, write_results

LENGTH = 1024
ROUNDS = 41


def main() -> None:
    """Time the embedded model with and without each method at four times its window."""
    model, _ = longctx.load("demo", device="cpu")
    twin, _ = longctx.load("demo", device="cpu")
    ids = torch.randint(0, 1000, (1, LENGTH), generator=torch.Generator().manual_seed(0))

    def native() -> None:
        with torch.no_grad():
            model(ids)

    def patched() -> None:
        with torch.no_grad():
            twin(ids)

    rows = [{"method": "none (a second copy)", **_row(native, patched)}]
    for name in ("linear", "ntk", "ntk_by_parts", "yarn", "llama3", "abf", "resonance"):
        with longctx.extend(twin, name, factor=4):
            rows.append({"method": name, **_row(native, patched)})
    write_results(
        "Frequency methods against the native model",
        "python -m benchmarks.frequency",
        rows,
        f"Forward of the embedded model at {LENGTH} tokens, float32; {ROUNDS} rounds in turns.",
    )


def _row(native: Callable[[], None], patched: Callable[[], None]) -> dict[str, str]:
    ratio = paired_ratio(native, patched, rounds=ROUNDS)
    memory = peak_memory(patched) / peak_memory(native)
    return {"time ratio [95%]": str(ratio), "peak memory ratio": f"{memory:.2f}"}


if __name__ == "__main__":
    main()
