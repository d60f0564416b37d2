"""Activation checkpointing, which transformers before 5.23 calls gradient checkpointing.

Delete it with those: `activation_checkpointing_enable` and the settings of that name remain.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers import __version__ as release

from longctx.errors import RunError

__all__ = ["checkpoint_activations", "checkpointing_arguments"]

_RENAMED = hasattr(PreTrainedModel, "activation_checkpointing_enable")


def checkpoint_activations(model: PreTrainedModel, settings: dict[str, Any] | None = None) -> None:
    """Turn it on, with torch's settings for a checkpoint (`use_reentrant`, …)."""
    named: Any = model
    if _RENAMED:
        named.activation_checkpointing_enable(settings)
    else:
        named.gradient_checkpointing_enable(settings)


def checkpointing_arguments(*, offload: bool) -> dict[str, Any]:
    """The settings of TrainingArguments that turn it on.

    Raises:
        RunError: `offload`, which older releases do not have.
    """
    settings: dict[str, Any] = {"use_reentrant": False}
    if _RENAMED:
        settings |= {"offload": True} if offload else {}
        return {"activation_checkpointing": True, "activation_checkpointing_kwargs": settings}
    if offload:
        raise RunError(
            f"gradient_checkpointing='offload' needs transformers 5.23, here is {release}: upgrade "
            "it, or pass gradient_checkpointing='layers'."
        )
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": settings}
