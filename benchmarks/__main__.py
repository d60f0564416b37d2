"""All benchmarks, one after the other: `python -m benchmarks` (over an hour on two cores)."""

from . import alibi, attention, frequency, loss, planner, preparing, scoring, sharing

for benchmark in (frequency, preparing, scoring, sharing, loss, planner, alibi, attention):
    benchmark.main()
