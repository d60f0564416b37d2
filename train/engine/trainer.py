"""transformers' Trainer with the house's batches, loss and refusals.

It leaves loop, optimizer, checkpoints and distribution as they are, and changes five things: the
loss is made inside the model's forward from the batch contract (`collate.py`, `loss_forward.py`);
updates are divided by the supervised tokens of each kind over all processes; a NaN or infinite
loss or gradient stops the run before it reaches the weights; checkpoints are marked when they
are whole; and evaluation is whatever function is passed.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from longctx.errors import RunError
from longctx.model import unwrapped

from ..config import Gate
from ..data.collate import PADDING, Collator, unpacked_inputs
from ..data.sampling import TrainDataset
from ..data.tokenize import IGNORED
from ..loss.sequence_unlikelihood import SequenceUnlikelihood
from ..parallel.sequence_shards import SharedRows, model_inputs, sequence_shard, whole_inputs
from ..parallel.ulysses import Aside, borrowed
from .packed_attention import PackedAttention
from .run_folder import WHOLE, last_whole

__all__ = ["Evaluate", "LongTrainer"]

Evaluate = Callable[[Any], Mapping[str, float]]
"""Figures of a model by name, such as {"passkey@2048": 0.9, "perplexity@256": 34.0}."""

Batch = dict[str, Tensor]


class LongTrainer(Trainer):
    """The Trainer of `finetune`, which sets it up and explains the settings."""

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: TrainDataset,
        collate: Collator,
        *,
        packed: PackedAttention | None,
        sequence: SequenceUnlikelihood | None = None,
        window: int | None,
        evaluate: Evaluate | None = None,
        gate: Gate | None = None,
        **rest: Any,
    ) -> None:
        # An evaluation data set is asked for wherever there is evaluation; ours needs none.
        shared: Any = args.parallelism_config
        size = shared.sp_size if shared else 1
        rows = (
            SharedRows(train_dataset, size, args.per_device_train_batch_size)
            if size > 1
            else train_dataset
        )
        sets: dict[str, Any] = {"train_dataset": rows, "eval_dataset": []}
        super().__init__(model, args, data_collator=collate, **sets, **rest)
        self.kinds = len(train_dataset.shares)
        self.packed = packed
        self.sequence = sequence
        self.window = window
        self.figures = evaluate
        self.gate = gate or Gate()
        self.loss_is_scaled_for_ga = True  # divided by the tokens of the whole update
        self.aside: Aside = nullcontext  # for whole sequences under sequence parallel
        self.stopped = ""
        """What the gate would not allow, if there was anything."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; under sequence parallel, with DeepSpeed in place meanwhile."""
        if self.get_sp_size() == 1:
            return super().train(*args, **kwargs)
        assert self.model is not None
        with borrowed(self.accelerator, unwrapped(self.model)) as self.aside:
            return super().train(*args, **kwargs)

    # -- the loss ------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Run the model on a batch; see `loss_forward.LossForward`."""
        if self.sequence is not None and self.sequence.has_turn(self.state.global_step):
            return self._continued(model, inputs)
        if self.sharers > 1:
            call = model_inputs(inputs)
        else:
            call = self.packed.inputs(inputs) if self.packed else unpacked_inputs(inputs)
            call |= {
                name: inputs[name]
                for name in ("labels", "document_ids", "kind_ids")
                if name in inputs
            }
        loss = self._finite(model(**call, count=num_items_in_batch))
        # Gradients are averaged over processes, and the count is of them all; DeepSpeed adds them
        # up over those that share a sequence.
        return loss * (self.accelerator.num_processes // self.get_sp_size())

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Learn from a batch; what is returned is averaged over processes and logged."""
        return super().training_step(*args, **kwargs) * self.get_sp_size()

    @property
    def sharers(self) -> int:
        """Processes that share a sequence, by ring attention or by exchanging heads."""
        return self.get_cp_size() * self.get_sp_size()

    def _continued(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Sequence-level unlikelihood, averaged over processes and accumulation steps."""
        assert self.sequence is not None
        prefixes = self.sequence.prefixes(inputs, self.state.global_step)
        share = 1 / self.args.gradient_accumulation_steps
        if not len(prefixes):  # the model runs all the same, lest other processes wait for it
            prefixes, share = inputs["input_ids"][:1, :1], 0.0
        return self._finite(model(prefixes=prefixes)) * share

    def _finite(self, loss: Tensor) -> Tensor:
        if not bool(torch.isfinite(loss)):
            raise RunError(self._no_number("loss", loss.detach()))
        return loss

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: Any) -> Any:
        """Where a sequence is shared, what cuts a batch into pieces, and the batch."""
        if self.sharers == 1:
            return super()._prepare_context_parallel_inputs(model, inputs)
        whole = whole_inputs(inputs, packed=self.packed is not None)
        if (size := self.get_sp_size()) > 1:
            part = sequence_shard(whole, self.accelerator.process_index % size, size)
            return nullcontext, part | (self.packed.borders(inputs) if self.packed else {})
        buffers = list(whole.values())
        cut = partial(
            self.accelerator.maybe_context_parallel,
            buffers=buffers,
            buffer_seq_dims=[1] * len(buffers),
            no_restore_buffers=set(buffers),
        )
        return cut, whole

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Any:
        """Supervised tokens of each kind over all processes and accumulation steps: int64 [K].

        Whole numbers, since FSDP rounds what is a float to bfloat16 on its way into the model.
        """
        kinds = self.kinds
        counts = torch.zeros(kinds + 1, dtype=torch.int64)
        for batch in batch_samples:
            self._refuse_beyond_window(batch["position_ids"])
            learnt = batch["labels"][:, 1:] != IGNORED
            of = batch.get("kind_ids", torch.zeros_like(batch["labels"]))[:, 1:]
            counts[:kinds] += torch.bincount(of[learnt], minlength=kinds)
            counts[kinds] += self._read(batch)
        if self.args.world_size > 1:
            gathered: Any = self.accelerator.gather(counts[None].to(device))
            counts = gathered.sum(0).cpu()
        counts //= self.sharers  # these processes hold the same rows
        self.state.num_input_tokens_seen += int(counts[kinds])
        return counts[:kinds].to(device)

    def _read(self, batch: Batch) -> int:
        """Tokens that an update reads: all, or what is continued and the continuation."""
        step = self.state.global_step
        if self.sequence is not None and self.sequence.has_turn(step):
            prefixes = self.sequence.prefixes(batch, step)
            return len(prefixes) * (prefixes.shape[1] + self.sequence.tokens)
        return int((batch["document_ids"] != PADDING).sum())

    def _refuse_beyond_window(self, position_ids: Tensor) -> None:
        reached = int(position_ids.max()) + 1
        if self.window is not None and reached > self.window:
            raise RunError(
                f"position {reached - 1:,} in a model with a window of {self.window:,} tokens: "
                "extend it further (a larger factor), or train on shorter rows (max_length)."
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP gives its part
        if not bool(torch.isfinite(torch.as_tensor(norm))):
            raise RunError(self._no_number("gradient norm", norm))
        return norm

    def _no_number(self, what: str, value: Any) -> str:
        step = self.state.global_step
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        rows *= self.args.world_size // self.sharers
        last = last_whole(Path(str(self.args.output_dir)))
        kept = f"{last} is the last good checkpoint" if last else "no checkpoint was written yet"
        return (
            f"the {what} is {float(value)} in update {step + 1}, rows {step * rows:,} to "
            f"{(step + 1) * rows - 1:,} of the training data: nothing was learnt from it, and "
            f"{kept}. Lower the learning rate, lengthen the warmup, or look at those rows "
            "(train_dataset[i])."
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; an update of sequence-level unlikelihood must not pass for cross-entropy."""
        step = self.state.global_step - 1
        if "loss" in logs and self.sequence is not None and self.sequence.has_turn(step):
            logs = {"sequence_loss": logs["loss"], **{k: logs[k] for k in logs if k != "loss"}}
        super().log(logs, *args, **kwargs)

    # -- checkpoints ---------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes a part
            if self.args.should_save:
                (folder / WHOLE).touch()
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _of_the_disk(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            last = last_whole(folder.parent)
            raise RunError(
                f"cannot write {folder}: {error}. {last or 'Nothing'} is what there is to resume "
                "from; make room and pass resume (--resume)."
            ) from error

    # -- evaluation ----------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Call the function that was passed, log its figures, and ask the gate."""
        assert self.figures is not None
        assert self.model is not None
        model = unwrapped(self.model)
        training = model.training
        model.eval()
        try:
            with self.aside():
                found = {f"eval_{name}": float(v) for name, v in self.figures(model).items()}
        finally:
            model.train(training)
        # One process decides for all, lest they part at the gate.
        found = broadcast_object_list([found])[0]
        for name in (self.gate.short, self.gate.best):
            if name is not None and f"eval_{name}" not in found:
                names = ", ".join(key.removeprefix("eval_") for key in found)
                raise RunError(f"the gate asks for {name!r}, the evaluation gives {names}.")
        self.log(found)
        self._ask_gate(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def evaluate_last(self) -> None:
        """Evaluate the model as it is at the end, unless that was just done."""
        done = [
            entry["step"]
            for entry in self.state.log_history
            if any(name.startswith("eval_") for name in entry)
        ]
        if done[-1:] != [self.state.global_step] or self.args.load_best_model_at_end:
            self.evaluate()

    def _ask_gate(self, found: Mapping[str, float]) -> None:
        if self.gate.short is None:
            return
        key = f"eval_{self.gate.short}"
        before = next(e[key] for e in self.state.log_history if key in e and e["step"] == 0)
        sign = 1 if Gate.falls(self.gate.short) else -1
        if sign * (found[key] - before) <= self.gate.worse * abs(before):
            return
        step, steps = self.state.global_step, self.state.max_steps
        said = (
            f"{self.gate.short} went from {before:.4g} to {found[key]:.4g} by update {step} of "
            f"{steps}, beyond the {100 * self.gate.worse:.3g}% that the gate allows"
        )
        if self.gate.action == "stop":
            self.stopped = said if step == steps else f"the run was ended: {said}"
            self.control.should_training_stop = True
        if self.is_world_process_zero():
            print(f"longctx: {said}", flush=True)


def _of_the_disk(error: Exception) -> bool:
    """Whether a write failed; torch wraps what the disk says in a RuntimeError of its own."""
    if isinstance(error, (OSError, SafetensorError)):
        return True
    words = ("PytorchStreamWriter", "unexpected pos", "iostream", os.strerror(errno.ENOSPC))
    return any(word in str(error) for word in words)
