"""All benchmarks, one after the other: `python -m benchmarks` (about an hour on two cores)."""

from . import alibi, frequency, loss, planner, scoring, sharing

for benchmark in (frequency, scoring, sharing, loss, planner, alibi):
    benchmark.main()
