"""Weights shared between processes (FSDP2): what accelerate is told, and the model whole again.

    arguments = TrainingArguments(…, **parallel_arguments(training, processes))
    empty = meta_copy(model)                          # before it is cut into pieces
    …                                              # train
    whole = gathered(trainer.accelerator, model, empty)

transformers cuts weights only where it is told `fsdp`: a ParallelismConfig alone trains plain DDP.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from longctx.errors import RunError

from ..config import Training
from .before_transformers_5_23 import checkpointing_arguments
from .ulysses import ulysses_arguments

__all__ = ["gathered", "is_sharded", "meta_copy", "parallel_arguments", "plugin_arguments"]


def is_sharded(training: Training) -> bool:
    """Whether no process holds the whole model; processes that share a sequence share weights."""
    return training.dp_shard * training.cp > 1


def parallel_arguments(training: Training, processes: int, attention: str) -> dict[str, Any]:
    """What transformers' TrainingArguments take for weights, sequences and activations.

    Args:
        training: how many processes share weights and sequences, and whether layers are run again.
        processes: that were started.
        attention: transformers' attention implementation of the model.

    Raises:
        RunError: a number of processes that does not fit, or what is not installed.
    """
    from accelerate.utils import ParallelismConfig

    offload = training.gradient_checkpointing == "offload"
    if not is_sharded(training):
        arguments = ulysses_arguments(training, processes, attention) if training.sp > 1 else {}
        if training.gradient_checkpointing == "none":
            return arguments
        return arguments | checkpointing_arguments(offload=offload)
    shared = training.dp_shard * training.cp
    replicas, rest = divmod(processes, shared)
    if rest or not replicas:
        raise RunError(
            f"dp_shard={training.dp_shard} and cp={training.cp} take {shared} processes or a "
            f"multiple of that, and there is {processes}: torchrun --nproc-per-node {shared} …"
        )
    if replicas > 1 and training.dp_shard == 1:
        raise RunError(
            f"cp={training.cp} on {processes} processes: those with rows of their own share "
            f"weights, so pass dp_shard={replicas} (--dp-shard)."
        )
    return {
        "parallelism_config": ParallelismConfig(
            dp_replicate_size=replicas, dp_shard_size=training.dp_shard, cp_size=training.cp
        ),
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            # Each process writes its own piece of a checkpoint: no process need hold the whole.
            "state_dict_type": "SHARDED_STATE_DICT",
            "activation_checkpointing": training.gradient_checkpointing != "none",
        },
    }


def plugin_arguments(training: Training, *, half: bool) -> dict[str, Any]:
    """What accelerate's FSDP plugin takes and transformers has no setting for.

    Args:
        training: whether activations go to the CPU.
        half: float32 weights are computed with in bfloat16.
    """
    # accelerate's own policy adds gradients up in bfloat16, and rounds the loss to it.
    floats = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    return {
        "activation_checkpointing_offload": training.gradient_checkpointing == "offload",
        "mixed_precision_policy": floats if half else None,
    }


def meta_copy(model: Any) -> Any:
    """A copy of `model`, adapters and patch included, whose weights have shapes and no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        memo[id(parameter)] = empty
    return copy.deepcopy(model, memo)


def gathered(accelerator: Accelerator, model: Any, empty: Any) -> Any:
    """Put the weights of a sharded model into its meta copy, on the CPU of the first process.

    Every process takes part; in the others the copy stays on meta.
    """
    weights: Any = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return empty
    tied: dict[int, list[str]] = {}
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    empty.load_state_dict(weights, assign=True)
    for first, *others in tied.values():
        for name in others:
            owner, _, own = name.rpartition(".")
            setattr(empty.get_submodule(owner), own, empty.get_parameter(first))
    return empty.to("cpu")
