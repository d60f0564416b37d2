"""Sequence parallel by DeepSpeed's Ulysses: processes with a piece each exchange heads for it.

    arguments = TrainingArguments(…, **precision(ulysses_arguments(training, 2, "sdpa"), half=True))
    with borrowed(trainer.accelerator, model):     # DeepSpeed in place, and gone afterwards
        trainer.train()

accelerate builds DeepSpeed's engine and puts Ulysses' attention on; the all-to-alls are theirs.
ZeRO stage 1: the processes share the optimizer's states, each has all weights and gradients, and a
NaN or infinite gradient is not learnt from (stage 0 has neither, and knows no gradient norm).
Batches are cut in `sequence_shards.py`: accelerate's adapter deals rows to other updates where more
than one group of processes shares sequences, and cannot skip those seen before an interruption.

Source: Jacobs et al., DeepSpeed Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longctx.errors import RunError
from longctx.model import attention_modules, text_config

from ..config import Training

__all__ = ["Aside", "borrowed", "precision", "ulysses_arguments"]

Aside: TypeAlias = Callable[[], AbstractContextManager[None]]

OLDEST = "0.19.8"
"""DeepSpeed that learns nothing from float32 NaN or infinite gradients; 0.19.6 still does."""


def ulysses_arguments(training: Training, processes: int, attention: str) -> dict[str, Any]:
    """What transformers' TrainingArguments take for sequence parallel.

    Args:
        training: how many processes share a sequence.
        processes: that were started.
        attention: transformers' attention implementation of the model.

    Raises:
        RunError: a number of processes that does not fit, or DeepSpeed missing or too old.
    """
    from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig

    size = training.sp
    replicas, left = divmod(processes, size)
    if left or not replicas:
        raise RunError(
            f"sp={size} takes {size} processes or a multiple of that, and there is {processes}: "
            f"torchrun --nproc-per-node {size} …"
        )
    try:
        found = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        found = "none"
    if found == "none" or Version(found) < Version(OLDEST):
        raise RunError(
            f"sp={size} needs DeepSpeed {OLDEST} or later, and there is {found}: pip install "
            f"'longctx-toolkit[sp]', or share sequences by ring attention (cp={size})."
        )
    handler = DeepSpeedSequenceParallelConfig(
        sp_seq_length_is_variable=True, sp_attn_implementation=attention
    )
    return {
        "parallelism_config": ParallelismConfig(
            dp_replicate_size=replicas, sp_size=size, sp_backend="deepspeed", sp_handler=handler
        ),
        "deepspeed": {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": training.max_grad_norm,
            # As many elements as a square matrix has, not DeepSpeed's 2 GB of buffer.
            "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
        },
    }


def precision(arguments: dict[str, Any], *, half: bool) -> dict[str, Any]:
    """Training arguments under which float32 weights are computed with in bfloat16, if `half`.

    DeepSpeed's own bfloat16 would cast the weights; under its autocast they and their gradients
    stay float32.
    """
    if not half or "deepspeed" not in arguments:
        return {**arguments, "bf16": half}
    cast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return {**arguments, "deepspeed": {**arguments["deepspeed"], "torch_autocast": cast}}


@contextmanager
def borrowed(accelerator: Accelerator, model: PreTrainedModel) -> Generator[Aside]:
    """Train under DeepSpeed, and take back what it puts on model and process.

    Args:
        accelerator: the trainer's.
        model: a transformers model, patched or not.

    Yields:
        What puts Ulysses aside for a while, for whole sequences in each process: it drops masks
        even where it does not exchange heads, and changes the number of heads per key/value head.
    """
    deepspeed: Any = importlib.import_module("deepspeed")
    state = importlib.import_module("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    groups = importlib.import_module("deepspeed.utils.groups")
    # Over the processes that talk already; accelerate does it on accelerators alone.
    deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False)
    accelerator.deepspeed_ulysses_dl_adapter = lambda dl, model: dl
    config: Any = text_config(model)
    name = config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS[name]
    heads = _kept((module, "num_key_value_groups") for _, module, _ in attention_modules(model))
    sharing = [(state, f"_SEQUENCE_{kind}PARALLEL_GROUP") for kind in ("", "DATA_")]
    process = _kept([(groups, "mpu"), *sharing])

    @contextmanager
    def aside() -> Generator[None]:
        exchanging = ALL_ATTENTION_FUNCTIONS[name]
        ALL_ATTENTION_FUNCTIONS[name] = attention
        _put_back(heads)
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS[name] = exchanging

    try:
        yield aside
    finally:
        if accelerator.deepspeed_engine_wrapped is not None:
            accelerator.deepspeed_engine_wrapped.engine.destroy()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # no longer a part of ZeRO's buffer
        ALL_ATTENTION_FUNCTIONS[name] = attention
        _put_back([*heads, *process])
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def _kept(places: Iterable[tuple[Any, str]]) -> list[tuple[Any, str, Any]]:
    return [(owner, name, getattr(owner, name)) for owner, name in places if hasattr(owner, name)]


def _put_back(kept: Iterable[tuple[Any, str, Any]]) -> None:
    for owner, name, value in kept:
        setattr(owner, name, value)
