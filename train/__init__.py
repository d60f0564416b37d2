"""Fine-tuning of patched models on long inputs."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.finetune import Finetuned, finetune

__all__ = ["Finetuned", "finetune"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and transformers take seconds."""
    if name in __all__:
        return getattr(importlib.import_module(".engine.finetune", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
