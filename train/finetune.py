"""Fine-tuning a patched model, from rows to a checkpoint that serves.

    longctx.extend(model, "linear", factor=8)
    feed = Epochs(pack(prepare("chats.json", tokenizer).dataset, 16_384), rows=1_000)
    done = finetune(model, tokenizer, feed, Training(steps=500), output="runs/x")
    done.model, done.saved.message, done.after

The engine is transformers' Trainer (`trainer.py`). An interrupted run goes on with `resume=True`
from its last checkpoint, with the rows it has not seen. Under torchrun every process makes the
same call: `Training(dp_shard=…, cp=…, sp=…)` shares weights and sequences, else each has all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from longctx.checkpoint import Saved
from longctx.core import extend, patch_of
from longctx.errors import RunError

from .adapters import Lora, add_lora, merged, save_adapter
from .batch import Collator
from .contract import FLASH, Setup, check_contract, reach
from .feed import Feed
from .folder import RunFolder
from .forward import LossForward, causal_of
from .losses import Losses
from .packed import packed_attention
from .positions import FullLength, Positions
from .progress import Log
from .serve import save_served
from .settings import Gate, Training
from .sharding import gathered, hollow, is_sharded, parallel_arguments, plugin_arguments
from .trainer import Evaluate, LongTrainer
from .ulysses import precision

__all__ = ["Finetuned", "finetune"]

_PATIENCE = timedelta(minutes=30)  # of processes that wait for another: it saves, say


@dataclass(frozen=True, slots=True)
class Finetuned:
    """What a run came to."""

    model: PreTrainedModel
    """The trained model, adapters merged into it, its patch in place. Under FSDP a copy of it on
    the CPU, whole in the first process and without weights in the others."""
    saved: Saved
    """Where it is and who can load it."""
    updates: int
    tokens: int
    """Seen, padding not counted, over all processes."""
    losses: tuple[float, ...]
    """Of each update, in nats per supervised token."""
    before: dict[str, float]
    """Figures before training; empty without an evaluation."""
    after: dict[str, float]
    stopped: str
    """Why it ended before its time; empty if it did not."""


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    feed: Feed,
    training: Training | None = None,
    *,
    output: str | os.PathLike[str],
    positions: Positions | None = None,
    losses: Losses | None = None,
    lora: Lora | None = None,
    packed: bool = True,
    shifted: bool = False,
    evaluate: Evaluate | None = None,
    gate: Gate | None = None,
    resume: bool = False,
    record: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Finetuned:
    """Train and save.

    Args:
        model: patched; trained in place. FSDP leaves it in pieces, and a whole copy comes back.
        tokenizer: saved beside it.
        feed: the rows (`feed.py`), whose number with batch size and accumulation gives the updates
            where `training.steps` is None.
        training: how long and how fast.
        output: folder of the run (`folder.py`).
        positions: where the tokens of each document stand.
        losses: what is minimised.
        lora: train adapters (and embeddings and norms, if so asked) instead of all weights.
        packed: rows may hold several documents.
        shifted: S²-Attn (`patches/shifted.py`) while it trains; the saved model attends to all.
        evaluate: figures of the model, before, after and every `training.evaluate_every` updates.
        gate: which of them may stop the run, and which chooses the best checkpoint.
        resume: go on with the run in `output`, if there is one.
        record: further settings that make the run what it is, to be compared on resume.
        progress: show how it goes on stderr.

    Raises:
        RunError: settings or a folder that do not fit, a loss that is no number, a full disk.
        ModelError: a model whose head or attention the trainer does not know.
        DataError: rows that do not fit.
    """
    training, gate = training or Training(), gate or Gate()
    positions, losses = positions or FullLength(), losses or Losses()
    if evaluate is None and (gate.short or gate.best or training.evaluate_every):
        raise RunError("a gate or an evaluation every so often needs `evaluate`, a function.")
    if gate.best and not training.evaluate_every:
        raise RunError(
            f"the best checkpoint by {gate.best} is asked for, and no evaluation on the way: pass "
            "evaluate_every (--evaluate-every)."
        )
    if evaluate is not None and is_sharded(training):
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
        shifted=shifted,
        custom_positions=positions.custom,
        whole_document_losses=losses.whole_document,
        fully_sharded=is_sharded(training),
    )
    check_contract(setup)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = parallel_arguments(training, started, setup.attention)
    state = PartialState(cpu=model.device.type == "cpu", timeout=_PATIENCE)
    first = state.is_main_process
    # Joins the other processes: what the first one begins, the others find there.
    with state.main_process_first():
        folder = RunFolder.open(
            Path(output),
            {
                "model": model.name_or_path,
                "method": str(getattr(patch_of(model), "method", None)),
                "training": str(training),
                "positions": str(positions),
                "losses": str(losses),
                "lora": str(lora),
                "packed": packed,
                "shifted": shifted,
                "rows": len(feed),
                **(record or {}),
            },
            resume=resume or not first,
            first=first,
        )
        last = folder.last_checkpoint(first=first)
    set_seed(training.seed)
    trained: Any = model if lora is None else add_lora(model, lora, seed=training.seed)
    empty = hollow(trained) if is_sharded(training) else None
    during = extend(model, "shifted") if shifted else None
    kernel = FLASH if training.sp > 1 and setup.attention == FLASH else "auto"
    attention = packed_attention(model, kernel) if packed or kernel == FLASH else None
    loss_forward = LossForward.on(trained, losses, feed.shares)
    log = Log(folder.log, shown=progress and first)
    cached = causal_of(trained).config.use_cache  # which the Trainer turns off for good
    try:
        trainer = LongTrainer(
            trained,
            _arguments(training, parallel, folder, feed, trained, evaluate is not None, gate),
            feed,
            _collator(training, positions, tokenizer),
            packed=attention,
            sequence=losses.sequence,
            window=reach(model),
            evaluate=evaluate,
            gate=gate,
            processing_class=tokenizer,
            callbacks=[log],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if evaluate is not None:
            trainer.evaluate_last()
    finally:
        log.close()
        causal_of(trained).config.use_cache = cached
        loss_forward.remove()
        if attention is not None:
            attention.remove()
        if during is not None:
            during.remove()
    whole = trained if empty is None else gathered(trainer.accelerator, trained, empty)
    if lora is not None:
        if first:
            save_adapter(whole, folder.adapter, overwrite=True)
        whole = merged(whole)
    history: list[dict[str, Any]] = trainer.state.log_history
    figures = [
        {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
        for entry in history
        if any(key.startswith("eval_") for key in entry)
    ]
    done: dict[str, Any] = {
        "updates": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "before": figures[0] if figures else {},
        "after": figures[-1] if figures else {},
        "stopped": trainer.stopped,
    }
    saved: Any = save_served(whole, tokenizer, folder, done) if first else None
    saved = broadcast_object_list([saved])[0]
    losses_seen = tuple(entry["loss"] for entry in history if "loss" in entry)
    return Finetuned(whole, saved, losses=losses_seen, **done)


def _collator(
    training: Training, positions: Positions, tokenizer: PreTrainedTokenizerBase
) -> Collator:
    pad: Any = tokenizer.pad_token_id or 0
    multiple = 2 * training.cp if training.cp > 1 else training.sp  # pieces of equal length
    return Collator(positions, pad_id=int(pad), multiple=multiple, seed=training.seed)


def _arguments(
    training: Training,
    parallel: dict[str, Any],
    folder: RunFolder,
    feed: Feed,
    model: Any,
    evaluated: bool,
    gate: Gate,
) -> TrainingArguments:
    device = causal_of(model).device.type
    processes = int(os.environ.get("WORLD_SIZE", "1")) // (training.cp * training.sp)
    rows = training.batch_size * training.accumulate * processes
    steps = training.steps or max(1, len(feed) // rows)
    if steps * rows > len(feed):
        raise RunError(
            f"{steps} updates of {rows} rows ({processes} processes) need {steps * rows} rows, the "
            f"feed has {len(feed)}: make it with rows={steps * rows}."
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
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulate,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup,
        lr_scheduler_type=training.schedule,
        weight_decay=training.weight_decay,
        adam_beta2=training.beta2,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        use_cpu=device == "cpu",
        seed=training.seed,
        save_steps=training.save_every if best is None else every or training.save_every,
        save_total_limit=training.keep,
        eval_on_start=evaluated,
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
    if arguments.fsdp_plugin_args is not None:
        arguments.fsdp_plugin_args |= plugin_arguments(training, half=half)
    return arguments
