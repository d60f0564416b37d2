"""All benchmarks, one after the other: `python -m benchmarks` (about 15 minutes on two cores)."""

from . import alibi, frequency, scoring

for benchmark in (frequency, scoring, alibi):
    benchmark.main()
