"""Measuring how far a model reads: tasks, sweeps over lengths and methods, tables and plots.

>>> from longctx.eval import Passkey, print_sweep, sweep
>>> result = sweep(model, tokenizer, [Passkey(samples=40), "perplexity"], "1k:16k",
...                methods=["none", "yarn:2"])                                # doctest: +SKIP
>>> print_sweep(result)                                                       # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from longctx.lazy_exports import exporter

if TYPE_CHECKING:
    from .comparison.compare import compare
    from .comparison.comparison import ComparedCell, ComparedTask, Comparison, PooledDifference
    from .decoding.bench import DecodeBench, decode_bench
    from .decoding.settings import BenchSettings
    from .reporting.decodings import print_decode_bench, write_decode_bench
    from .reporting.files import write_comparison, write_sweep
    from .reporting.tables import print_comparison, print_sweep, regressions
    from .results.sweep_result import Row, SweepResult
    from .running.lengths import parse_lengths
    from .running.sweep import sweep
    from .stats.longppl import key_tokens, long_ppl, position_curve
    from .tasks.lines import Lines
    from .tasks.multi_key import MultiKey
    from .tasks.multi_value import MultiValue
    from .tasks.needle import Needle
    from .tasks.passkey import Passkey
    from .tasks.perplexity import Perplexity
    from .tasks.questions import Questions
    from .tasks.repetition import Repetition
    from .tasks.ruler import Ruler
    from .tasks.shared.adaptive import Adaptive
    from .tasks.shared.protocol import Measured, Observation, Plan, Summary, Task, Unit
    from .tasks.shared.registry import available_tasks, parse_task
    from .tasks.topics import Topics
    from .tasks.variable_tracking import VariableTracking

__all__ = [
    "Adaptive",
    "BenchSettings",
    "ComparedCell",
    "ComparedTask",
    "Comparison",
    "DecodeBench",
    "Lines",
    "Measured",
    "MultiKey",
    "MultiValue",
    "Needle",
    "Observation",
    "Passkey",
    "Perplexity",
    "Plan",
    "PooledDifference",
    "Questions",
    "Repetition",
    "Row",
    "Ruler",
    "Summary",
    "SweepResult",
    "Task",
    "Topics",
    "Unit",
    "VariableTracking",
    "available_tasks",
    "compare",
    "decode_bench",
    "key_tokens",
    "long_ppl",
    "parse_lengths",
    "parse_task",
    "position_curve",
    "print_comparison",
    "print_decode_bench",
    "print_sweep",
    "regressions",
    "sweep",
    "write_comparison",
    "write_decode_bench",
    "write_sweep",
]

__getattr__ = exporter(
    __name__,
    __all__,
    (
        "tasks.shared.protocol",
        "tasks.shared.registry",
        "tasks.shared.adaptive",
        "tasks.passkey",
        "tasks.needle",
        "tasks.multi_key",
        "tasks.multi_value",
        "tasks.variable_tracking",
        "tasks.lines",
        "tasks.topics",
        "tasks.perplexity",
        "tasks.questions",
        "tasks.ruler",
        "tasks.repetition",
        "running.lengths",
        "running.sweep",
        "results.sweep_result",
        "comparison.comparison",
        "comparison.compare",
        "decoding.settings",
        "decoding.bench",
        "reporting.decodings",
        "reporting.tables",
        "reporting.files",
        "stats.longppl",
    ),
)
