"""The argument that a model takes its cache by: `past_key_values` in transformers before 5.24.

Delete it with those: `cache` remains.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["cache_argument"]


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """The name of the argument in a model's `forward`, None where it takes no such cache."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)
