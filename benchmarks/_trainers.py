"""LoRA by longctx's trainer and by TRL's SFTTrainer: the same model, rows and adapters for both."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from longctx.checkpoint import load_tokenizer
from longctx.train.config import Gate, Training
from longctx.train.data.collate import Collator
from longctx.train.data.sampling import TrainDataset
from longctx.train.engine.lora import Lora, add_lora
from longctx.train.engine.loss_forward import LossForward
from longctx.train.engine.trainer import LongTrainer
from longctx.train.engine.trainer_arguments import checked, trainer_arguments
from longctx.train.loss.objective import Losses

__all__ = ["Clock", "TokenRows", "train_ours", "train_theirs"]

Checkpointing = Literal["none", "layers"]


class TokenRows(TrainDataset):
    """Rows of token ids [rows, tokens], all of them learnt."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.tokens = ids.shape[1]
        self.rows: list[list[int]] = ids.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Clock(TrainerCallback):
    """Takes the time of each update, to the end of what it started on the device."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.cpu_marks: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The first update begins."""
        if not self.marks:
            self._mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """An update is done, and the next begins."""
        self._mark()

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        self.cpu_marks.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        """Of all updates but the first."""
        return [b - a for a, b in pairwise(self.marks[1:])]

    @property
    def cpu_seconds(self) -> list[float]:
        """The same in the time that processors worked for this process, all threads together."""
        return [b - a for a, b in pairwise(self.cpu_marks[1:])]


def train_ours(
    model: PreTrainedModel,
    rows: TokenRows,
    folder: Path,
    *,
    rank: int,
    checkpointing: Checkpointing,
) -> tuple[Clock, list[dict[str, Any]]]:
    """As `longctx train --lora-r RANK` sets it up, an update a row, without saving.

    Returns:
        The time of the updates, and the trainer's log.
    """
    clock = Clock()
    training = Training(max_steps=len(rows), gradient_checkpointing=checkpointing)
    _, parallel = checked(
        model, training, Gate(), Losses(), packed=False, shifted=False, evaluated=False
    )
    trained: Any = add_lora(model, Lora(r=rank))
    loss_forward = LossForward.on(trained, Losses(), rows.shares)
    arguments = trainer_arguments(
        *(training, Gate(), parallel, rows, trained),
        output_dir=folder,
        evaluated=False,
        resumed=False,
    )
    arguments.save_strategy = SaveStrategy.NO
    trainer = LongTrainer(
        *(trained, arguments, rows, Collator()), packed=None, window=rows.tokens, callbacks=[clock]
    )
    trainer.train()
    loss_forward.remove()
    return clock, trainer.state.log_history


def train_theirs(
    model: PreTrainedModel,
    rows: TokenRows,
    folder: Path,
    *,
    rank: int,
    checkpointing: Checkpointing,
) -> tuple[Clock, list[dict[str, Any]]]:
    """TRL's SFTTrainer, its own settings but for what makes the work the same."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    clock = Clock()
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": len(rows),
        "per_device_train_batch_size": 1,
        "max_length": rows.tokens,
        "packing": False,
        "gradient_checkpointing": checkpointing == "layers",
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    adapters: Any = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=Lora().target_modules_in(model),
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list([rows[index] for index in range(len(rows))]),
        processing_class=load_tokenizer("demo"),
        peft_config=adapters,
        callbacks=[clock],
    )
    trainer.train()
    return clock, trainer.state.log_history
