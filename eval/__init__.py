"""Measuring how far a model reads: tasks, sweeps over lengths and methods, tables and plots.

>>> from longctx.eval import Passkey, sweep
>>> result = sweep(model, tokenizer, [Passkey(samples=40), "perplexity"], "1k:16k",
...                methods=["none", "yarn:2"])                                # doctest: +SKIP
"""

from .adaptive import Adaptive
from .lengths import parse_lengths
from .passkey import Passkey
from .perplexity import Perplexity
from .results import Row, SweepResult
from .sweep import TASKS, sweep
from .task import Measured, Observation, Plan, Summary, Task, Unit

__all__ = [
    "TASKS",
    "Adaptive",
    "Measured",
    "Observation",
    "Passkey",
    "Perplexity",
    "Plan",
    "Row",
    "Summary",
    "SweepResult",
    "Task",
    "Unit",
    "parse_lengths",
    "sweep",
]
