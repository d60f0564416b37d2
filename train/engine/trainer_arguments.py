"""What transformers' Trainer is told, and what is refused before anything is trained or written."""

from __future__ import annotations

import os
from collections.abc import Sized
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from longctx.errors import RunError, nearest
from longctx.model import unwrapped
from longctx.registry import make_method

from ..config import Gate, Training
from ..loss.objective import Losses
from ..parallel.compatibility import Setup, check_compatibility
from ..parallel.fsdp import is_sharded, parallel_arguments, plugin_arguments
from ..parallel.ulysses import precision

__all__ = ["checked", "rows_per_update", "trainer_arguments"]

_SCHEDULES = {"constant": "constant_with_warmup"}  # transformers' own "constant" has no warmup


def rows_per_update(training: Training) -> int:
    """Rows of the training data that an update takes, over all processes that were started."""
    processes = int(os.environ.get("WORLD_SIZE", "1")) // (training.cp * training.sp)
    return training.batch_size * training.gradient_accumulation_steps * max(1, processes)


def checked(
    model: PreTrainedModel,
    training: Training,
    gate: Gate,
    losses: Losses,
    *,
    packed: bool,
    shifted: bool,
    evaluated: bool,
) -> tuple[Setup, dict[str, Any]]:
    """Refuse what does not go together.

    Returns:
        The settings as the check of compatibility sees them, and arguments for distribution.

    Raises:
        RunError: names the settings and the way out.
    """
    _refuse_unknown(training)
    if not evaluated and (gate.short or gate.best or training.evaluate_every):
        raise RunError(
            "a gate, a best checkpoint or an evaluation every so often needs figures: pass "
            "`evaluate` (--evaluate passkey perplexity)."
        )
    if gate.best and not training.evaluate_every:
        raise RunError(
            f"the best checkpoint by {gate.best} is asked for, and no evaluation on the way: pass "
            "evaluate_every (--evaluate-every)."
        )
    if evaluated and is_sharded(training):
        raise RunError(
            f"an evaluation needs a whole model in each process, and dp_shard={training.dp_shard}, "
            f"cp={training.cp} leave none: train without (--evaluate and nothing after it), and "
            "measure the saved model (longctx sweep)."
        )
    setup = Setup.of(
        model,
        context_parallel=training.cp,
        sequence_parallel=training.sp,
        packed=packed,
        put_on_later=make_method("shifted", {}) if shifted else None,
        whole_document_losses=losses.whole_document,
        fully_sharded=is_sharded(training),
    )
    check_compatibility(setup)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    return setup, parallel_arguments(training, started, setup.attention)


def _refuse_unknown(training: Training) -> None:
    """Refuse optimizers and trackers that are not there: transformers would when all is tokenised.

    Raises:
        RunError: it names those that are.
    """
    optimizers = [str(name.value) for name in OptimizerNames]
    if training.optimizer not in optimizers:
        raise RunError(
            f"optimizer={training.optimizer!r}{nearest(training.optimizer, optimizers)}: expected "
            f"one of {', '.join(optimizers)}."
        )
    theirs = any(word in training.optimizer for word in ("8bit", "4bit", "paged", "bnb"))
    if theirs and not find_spec("bitsandbytes"):
        raise RunError(
            f"optimizer={training.optimizer!r} is bitsandbytes': pip install bitsandbytes, or take "
            "adamw_torch."
        )
    there = get_available_reporting_integrations()
    absent = [name for name in training.report_to if name not in there]
    if absent:
        raise RunError(
            f"report_to={absent[0]!r}: no such tracker is installed (here: "
            f"{', '.join(there) or 'none'}); pip install it, or leave it out."
        )


def trainer_arguments(
    training: Training,
    gate: Gate,
    parallel: dict[str, Any],
    train_dataset: Sized,
    model: Any,
    *,
    output_dir: Path,
    evaluated: bool,
    resumed: bool,
) -> TrainingArguments:
    """The settings in transformers' words.

    Args:
        training: how long, how fast, on what.
        gate: what chooses the best checkpoint.
        parallel: from `checked`.
        train_dataset: its rows set the updates where `training.max_steps` is None.
        model: what is trained, adapters in place.
        output_dir: folder for checkpoints.
        evaluated: whether figures are taken.
        resumed: whether there is a checkpoint, and so figures from before training.

    Raises:
        RunError: too few rows, or weights in half precision.
    """
    device = unwrapped(model).device.type
    rows = rows_per_update(training)
    steps = training.max_steps or max(1, len(train_dataset) // rows)
    if steps * rows > len(train_dataset):
        raise RunError(
            f"{steps} updates of {rows} rows need {steps * rows} rows, train_dataset has "
            f"{len(train_dataset)}: make it with rows={steps * rows}."
        )
    whole = {p.dtype for p in model.parameters() if p.requires_grad}
    if whole & {torch.bfloat16, torch.float16}:
        raise RunError(
            "weights to be trained are in half precision, in which small updates are rounded away: "
            "load the model in float32 (--dtype float32); on CUDA it computes in bfloat16 all the "
            "same."
        )
    half = device == "cuda" and torch.float32 in whole
    best = f"eval_{gate.best}" if gate.best else None
    every = training.evaluate_every
    settings: dict[str, Any] = dict(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup,
        lr_scheduler_type=_SCHEDULES.get(training.schedule, training.schedule),
        weight_decay=training.weight_decay,
        adam_beta2=training.beta2,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        use_cpu=device == "cpu",
        seed=training.seed,
        save_steps=training.save_every if best is None else every or training.save_every,
        save_total_limit=training.save_total_limit,
        eval_on_start=evaluated and not resumed,
        eval_strategy="steps" if evaluated and every else "no",
        eval_steps=every,
        metric_for_best_model=best,
        greater_is_better=None if gate.best is None else not gate.falls(gate.best),
        load_best_model_at_end=best is not None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(training.report_to) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=device == "cuda",
        **precision(parallel, half=half),
    )
    try:
        arguments = TrainingArguments(**settings)
    except ValueError as error:  # of distribution on a CPU, say
        raise RunError(f"transformers refuses these settings: {error}") from error
    if arguments.n_gpu > 1:  # one process, one GPU: the Trainer would wrap the model for all
        arguments._n_gpu = 1  # pyright: ignore[reportPrivateUsage]
    if arguments.fsdp_plugin_args is not None:
        arguments.fsdp_plugin_args |= plugin_arguments(training, half=half)
    return arguments
