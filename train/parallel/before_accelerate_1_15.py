"""Activations kept in the CPU's memory under FSDP, which accelerate has from 1.15 on.

Delete it with older ones: the setting's name alone remains.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import accelerate
from accelerate import FullyShardedDataParallelPlugin

from longctx.errors import RunError

__all__ = ["offload_arguments"]

_SETTING = "activation_checkpointing_offload"


def offload_arguments(*, offload: bool) -> dict[str, Any]:
    """The settings of accelerate's FSDP plugin that turn it on or leave it off.

    Raises:
        RunError: `offload`, which this release does not have.
    """
    if not offload:
        return {}
    if _SETTING not in {field.name for field in dataclasses.fields(FullyShardedDataParallelPlugin)}:
        raise RunError(
            "gradient_checkpointing='offload' under dp_shard or cp needs accelerate 1.15, here is "
            f"{accelerate.__version__}: upgrade it, or pass gradient_checkpointing='layers'."
        )
    return {_SETTING: True}
