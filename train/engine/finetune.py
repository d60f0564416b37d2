"""Fine-tuning a patched model, from rows to a checkpoint that serves.

    longctx.extend(model, "linear", factor=8)
    train_dataset = Epochs(pack(prepare("chats.json", tokenizer).dataset, 16_384), rows=1_000)
    done = finetune(model, tokenizer, train_dataset, Training(max_steps=500), output_dir="runs/x")
    done.model, done.saved.message, done.after

The engine is transformers' Trainer (`trainer.py`). An interrupted run goes on with `resume=True`
from its last checkpoint, with the rows it has not seen. Under torchrun every process makes the
same call: `Training(dp_shard=…, cp=…, sp=…)` shares weights and sequences, else each has all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from longctx.checkpoint import Saved
from longctx.core import extend
from longctx.errors import RunError
from longctx.fingerprint import model_digest
from longctx.model import unwrapped
from longctx.patch import methods_of

from ..config import Gate, Training
from ..data.collate import Collator
from ..data.endings import ending_tokens, stop_at
from ..data.sampling import TrainDataset
from ..loss.objective import Losses
from ..parallel.compatibility import FLASH, trainable_window
from ..parallel.fsdp import gathered, is_sharded, meta_copy
from ..positions import FullLength, Positions
from .export import difference, probe, save_served
from .log import Log
from .lora import Lora, add_lora, merged, save_adapter
from .loss_forward import LossForward
from .packed_attention import packed_attention
from .run_folder import RunFolder
from .teaching import TrainedWeights, frozen, listening, refuse_teacher
from .trainer import Evaluate, LongTrainer
from .trainer_arguments import checked, trainer_arguments

__all__ = ["Finetuned", "finetune"]

_ROWS = 64  # that are looked at for what answers end with
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
    """What each update minimised: nats per supervised token, weighted under LongCE, with
    unlikelihood and the contrastive loss where they are asked for; updates of sequence-level
    unlikelihood are left out."""
    before: dict[str, float]
    """Figures before training; empty without an evaluation."""
    after: dict[str, float]
    stopped: str
    """What the gate would not allow: what ended the run, or was found at its end; else empty."""
    rounded: float
    """Difference of logits that merging adapters made, relative to the largest: 0 but for rounding,
    which a base in half precision does coarsely. The figures are of the model before."""


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: TrainDataset,
    training: Training | None = None,
    *,
    output_dir: str | os.PathLike[str],
    positions: Positions | None = None,
    losses: Losses | None = None,
    lora: Lora | None = None,
    packed: bool = True,
    shifted: bool = False,
    teacher: PreTrainedModel | None = None,
    weights: TrainedWeights = "all",
    evaluate: Evaluate | None = None,
    gate: Gate | None = None,
    resume: bool = False,
    record: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Finetuned:
    """Train and save.

    Args:
        model: patched; trained in place. FSDP leaves it in pieces, and a whole copy comes back.
            Its generation config is told to stop at what the learnt answers end with.
        tokenizer: saved beside it.
        train_dataset: the rows (`data/sampling.py`), whose number with batch size and accumulation
            gives the updates where `training.max_steps` is None.
        training: how long and how fast.
        output_dir: folder of the run (`run_folder.py`).
        positions: where the tokens of each document stand.
        losses: what is minimised.
        lora: train adapters (and embeddings and norms, if so asked) instead of all weights.
        packed: rows may hold several documents.
        shifted: S²-Attn (`patches/shifted.py`) while it trains; the saved model attends to all.
        teacher: the model whose logits are learnt (`losses.distillation`); it stays as it is.
        weights: all of them, those of the attention, or the features that a conversion gave it.
        evaluate: figures of the model, before, after and every `training.evaluate_every` updates.
        gate: which of them may stop the run, and which chooses the best checkpoint.
        resume: go on with the run in `output_dir`, if there is one.
        record: further settings that make the run what it is, to be compared on resume.
        progress: show how it goes on stderr.

    Raises:
        RunError: settings or a folder that do not fit, a NaN or infinite loss, a full disk.
        ModelError: a model whose head or attention the trainer does not know.
        DataError: rows that do not fit.
    """
    training, gate = training or Training(), gate or Gate()
    positions, losses = positions or FullLength(), losses or Losses()
    choices: dict[str, Any] = {"packed": packed, "shifted": shifted}
    evaluated = evaluate is not None
    setup, parallel = checked(model, training, gate, losses, evaluated=evaluated, **choices)
    refuse_teacher(model, teacher, losses, training)
    if lora is not None and weights != "all":
        raise RunError(f"weights={weights!r} and adapters: adapters leave the weights as they are.")
    state = PartialState(cpu=model.device.type == "cpu", timeout=_PATIENCE)
    first = state.is_main_process
    # Joins the other processes: what the first one begins, the others find there.
    with ExitStack() as held:
        with state.main_process_first():
            folder = RunFolder.open(
                Path(output_dir),
                {
                    "model": model.name_or_path,
                    "weights": model_digest(model),
                    "method": " + ".join(map(str, methods_of(model))) or "None",
                    **training.record(),
                    "gate": str(gate),
                    "evaluated": evaluated,
                    "positions": str(positions),
                    "losses": str(losses),
                    "lora": str(lora),
                    **({} if weights == "all" else {"trained_weights": weights}),
                    **({} if teacher is None else {"teacher": model_digest(teacher)}),
                    "rows": len(train_dataset),
                    **choices,
                    **(record or {}),
                },
                resume=resume or not first,
                first=first,
            )
            held.callback(folder.close)
            last = folder.last_checkpoint(first=first)
        set_seed(training.seed)
        trained: Any = model if lora is None else add_lora(model, lora, seed=training.seed)
        empty = meta_copy(trained) if is_sharded(training) else None
        kernel = FLASH if training.sp > 1 and setup.attention == FLASH else "auto"
        with ExitStack() as put_on:
            if shifted:
                put_on.callback(extend(model, "shifted").remove)
            attention = packed_attention(model, kernel) if packed or kernel == FLASH else None
            if attention is not None:
                put_on.callback(attention.remove)
            put_on.enter_context(frozen(model, weights))
            if teacher is not None:
                put_on.enter_context(listening(teacher, packed=attention is not None))
            loss_forward = LossForward.on(trained, losses, train_dataset.shares, teacher)
            put_on.callback(loss_forward.remove)
            put_on.callback(
                setattr, config := unwrapped(trained).config, "use_cache", config.use_cache
            )
            log = Log(folder.log, shown=progress and first)
            put_on.callback(log.close)
            trainer = LongTrainer(
                trained,
                trainer_arguments(
                    training,
                    gate,
                    parallel,
                    train_dataset,
                    trained,
                    output_dir=folder.checkpoints,
                    evaluated=evaluated,
                    resumed=last is not None,
                ),
                train_dataset,
                _collator(training, positions, tokenizer),
                packed=attention,
                sequence=losses.sequence,
                window=trainable_window(model),
                evaluate=evaluate,
                gate=gate,
                processing_class=tokenizer,
                callbacks=[log],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
            if evaluated:
                trainer.evaluate_last()
        whole = trained if empty is None else gathered(trainer.accelerator, trained, empty)
        rounded = 0.0
        if lora is not None:
            beside = probe(whole) if first else None
            if first:
                save_adapter(whole, folder.adapter, overwrite=True)
            whole = merged(whole)
            rounded = 0.0 if beside is None else difference(beside, probe(whole))
        history: list[dict[str, Any]] = trainer.state.log_history
        figures = {
            entry["step"]: {k[5:]: v for k, v in entry.items() if k.startswith("eval_")}
            for entry in history
            if any(key.startswith("eval_") for key in entry)
        }
        done: dict[str, Any] = {
            "updates": trainer.state.global_step,
            "tokens": trainer.state.num_input_tokens_seen,
            "before": figures.get(0, {}),
            "after": figures[max(figures)] if figures else {},
            "stopped": trainer.stopped,
            "rounded": rounded,
        }
        if first:  # some rows of all, which are enough to see what answers end with
            some = range(0, len(train_dataset), max(1, len(train_dataset) // _ROWS))
            stop_at(whole, ending_tokens((train_dataset[index] for index in some), tokenizer))
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
