"""All benchmarks, one after the other: `python -m benchmarks` (about half an hour on two cores)."""

from . import alibi, frequency, scoring, sharing

for benchmark in (frequency, scoring, sharing, alibi):
    benchmark.main()
