"""Measuring how far a model reads: tasks, sweeps over lengths and methods, tables and plots.

>>> from longctx.eval import Passkey, print_sweep, sweep
>>> result = sweep(model, tokenizer, [Passkey(samples=40), "perplexity"], "1k:16k",
...                methods=["none", "yarn:2"])                                # doctest: +SKIP
>>> print_sweep(result)                                                       # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from longctx.lazy_exports import exporter

if TYPE_CHECKING:
    from .choice.choose import Choice, Finalist, choose
    from .choice.settings import ChoiceSettings
    from .comparison.compare import compare
    from .comparison.comparison import ComparedCell, ComparedTask, Comparison, PooledDifference
    from .decoding.bench import decode_bench
    from .decoding.result import DecodeBench
    from .decoding.settings import BenchSettings
    from .reporting.choice import print_choice, write_choice
    from .reporting.decoding_files import write_decode_bench
    from .reporting.decoding_tables import print_decode_bench
    from .reporting.files import write_comparison, write_sweep
    from .reporting.tables import print_comparison, print_sweep, regressions
    from .results.sweep_result import Row, SweepResult
    from .running.lengths import parse_lengths
    from .running.sweep import sweep
    from .searching.search import FoundDivisors, search, write_found
    from .searching.settings import SearchSettings
    from .stats.longppl import key_tokens, long_ppl, position_curve
    from .tasks.lines import Lines
    from .tasks.longppl import LongPpl
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
    "Choice",
    "ChoiceSettings",
    "ComparedCell",
    "ComparedTask",
    "Comparison",
    "DecodeBench",
    "Finalist",
    "FoundDivisors",
    "Lines",
    "LongPpl",
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
    "SearchSettings",
    "Summary",
    "SweepResult",
    "Task",
    "Topics",
    "Unit",
    "VariableTracking",
    "available_tasks",
    "choose",
    "compare",
    "decode_bench",
    "key_tokens",
    "long_ppl",
    "parse_lengths",
    "parse_task",
    "position_curve",
    "print_choice",
    "print_comparison",
    "print_decode_bench",
    "print_sweep",
    "regressions",
    "search",
    "sweep",
    "write_choice",
    "write_comparison",
    "write_decode_bench",
    "write_found",
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
        "tasks.longppl",
        "tasks.questions",
        "tasks.ruler",
        "tasks.repetition",
        "running.lengths",
        "running.sweep",
        "results.sweep_result",
        "comparison.comparison",
        "comparison.compare",
        "choice.settings",
        "choice.choose",
        "searching.settings",
        "searching.search",
        "reporting.choice",
        "decoding.settings",
        "decoding.result",
        "decoding.bench",
        "reporting.decoding_files",
        "reporting.decoding_tables",
        "reporting.tables",
        "reporting.files",
        "stats.longppl",
    ),
)
