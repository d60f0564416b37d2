"""Measuring how far a model reads: tasks, sweeps over lengths and methods, tables and plots.

>>> from longctx.eval import Passkey, sweep
>>> result = sweep(model, tokenizer, [Passkey(samples=40), "perplexity"], "1k:16k",
...                methods=["none", "yarn:2"])                                # doctest: +SKIP
"""

from .adaptive import Adaptive
from .compare import compare
from .comparison import ComparedCell, ComparedTask, Comparison, PooledDifference
from .generation import Repetition
from .lengths import parse_lengths
from .lines import Lines
from .longppl import key_tokens, long_ppl, position_curve
from .multi_key import MultiKey
from .multi_value import MultiValue
from .needle import Needle
from .passkey import Passkey
from .perplexity import Perplexity
from .results import Row, SweepResult
from .sweep import TASKS, sweep
from .task import Measured, Observation, Plan, Summary, Task, Unit
from .topics import Topics
from .variable_tracking import VariableTracking

__all__ = [
    "TASKS",
    "Adaptive",
    "ComparedCell",
    "ComparedTask",
    "Comparison",
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
    "Repetition",
    "Row",
    "Summary",
    "SweepResult",
    "Task",
    "Topics",
    "Unit",
    "VariableTracking",
    "compare",
    "key_tokens",
    "long_ppl",
    "parse_lengths",
    "position_curve",
    "sweep",
]
