"""All benchmarks, one after the other: `python -m benchmarks` (over an hour on two cores)."""

from . import (
    alibi,
    attention,
    frequency,
    generation,
    loss,
    planner,
    preparing,
    scoring,
    sharing,
)

for benchmark in (
    frequency, preparing, scoring, sharing, generation, loss, planner, alibi, attention,
):  # fmt: skip
    benchmark.main()
