"""A recipe with data and a folder: from a loaded model to one that serves, in one call.

    run = Run(LONGCHAT_16K, data=("chats.json",), output_dir=Path("runs/x"))
    run.extend(model)
    done = run.start(model, tokenizer)

The model is extended first, so that what cannot be put on is refused before any data is read.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.attention.remapped import needs_consecutive_positions
from longctx.core import extend, extend_all
from longctx.errors import RunError
from longctx.patch import methods_of, patch_of
from longctx.prompts.haystacks import bos_of, held_in
from longctx.registry import parse_methods
from longctx.weights import refuse_small_vocabulary

from .config import Gate
from .data.chat_template import chat_template
from .data.collate import pack
from .data.passkeys import Passkeys
from .data.preparation import Prepared, prepare
from .data.sampling import DocumentSource, Epochs, Mixture, MixtureWeight, TrainDataset
from .data.tokenize import TokenizeSettings
from .engine.finetune import Finetuned, finetune
from .engine.run_folder import RunFolder
from .engine.teaching import refuse_teacher
from .engine.trainer_arguments import checked, rows_per_update
from .parallel.compatibility import trainable_window
from .positions import Positions
from .recipes import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

    from .engine.trainer import Evaluate

__all__ = ["Run", "TrainingPlan"]


@dataclass(frozen=True, slots=True)
class Run:
    """A recipe, data for it, and where it goes."""

    recipe: Recipe
    data: tuple[str, ...]
    """Sources that `data.preparation.prepare` reads, one after the other."""
    output_dir: Path
    """Folder of the run."""
    template: str | None = None
    """Chat template; see `TokenizeSettings`."""
    strict: bool = False
    """Refuse conversations out of order instead of tidying them."""
    salvage: bool = False
    """Go on with the whole records of a file that breaks off."""
    split: str = "train"
    """Of a hub id, a folder, or a file with a list for each split."""
    skip_bad: bool = False
    """Leave out records that cannot be used, and count them by reason."""
    workers: int = 1
    """Processes that tokenise."""

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[Prepared]:
        """Read, render, tokenise and label the data.

        Raises:
            DataError: what cannot be read or understood.
        """
        settings = TokenizeSettings(
            max_length=self.recipe.document_tokens,
            overflow=self.recipe.overflow,
            template=self.template,
            strict=self.strict,
        )
        if not self.data:
            raise RunError("no data: pass files, folders or hub ids, or sample.")
        options: dict[str, Any] = {
            "salvage": self.salvage,
            "split": self.split,
            "skip_bad": self.skip_bad,
        }
        return [
            prepare(source, tokenizer, settings, workers=self.workers, **options)
            for source in self.data
        ]

    def extend(self, model: PreTrainedModel, *, replace: bool = False) -> None:
        """Put the methods on, unless the model brings a patch and the recipe says none.

        Raises:
            MethodError: one cannot be put on.
            RunError: rows longer than the extended window.
        """
        extend_all(model, parse_methods(self.recipe.method), replace=replace)
        patch, known = patch_of(model), trainable_window(model)
        varying = [method.name for method in methods_of(model) if not method.length_invariant]
        if patch and varying and self.recipe.max_length > patch.rope.length:
            raise RunError(
                f"{varying[0]} changes nothing within the {patch.rope.length:,} tokens of the old "
                "window and depends on the whole input beyond it: it is not trained. Take ntk "
                "or yarn."
            )
        if known is not None and self.recipe.max_length > known:
            raise RunError(
                f"max_length={self.recipe.max_length:,} is beyond the {known:,} tokens of the "
                f"patched window ({self.recipe.method}): pass a larger factor, a target, or a "
                "shorter length."
            )

    def plan(self, tokenizer: PreTrainedTokenizerBase, prepared: list[Prepared]) -> TrainingPlan:
        """What the data come to: rows in their order, and how many updates they are."""
        from datasets import concatenate_datasets

        dataset = concatenate_datasets([part.dataset for part in prepared])
        return TrainingPlan.of(self.recipe, dataset, tokenizer, self._record(prepared))

    def check(
        self,
        model: PreTrainedModel,
        *,
        evaluated: bool,
        teacher: PreTrainedModel | None = None,
        gate: Gate | None = None,
        resume: bool = False,
    ) -> None:
        """Refuse what `start` would, as far as it can be seen before the data are read.

        Raises:
            RunError: settings that do not go together.
        """
        recipe = self.recipe
        choices: dict[str, Any] = {"packed": recipe.pack, "shifted": recipe.shifted}
        gate = gate or Gate()
        RunFolder.refuse(self.output_dir, resume=resume)
        if recipe.lora is not None:
            recipe.lora.target_modules_in(model)
        if recipe.shifted:
            extend(model, "shifted").remove()
        if recipe.positions not in ("full", "schedule") and needs_consecutive_positions(model):
            raise RunError(
                f"positions={recipe.positions!r} skips positions, and {recipe.method} counts "
                'distances from consecutive tokens: train with positions="full" or "schedule" '
                "(--positions full)."
            )
        refuse_teacher(model, teacher, recipe.losses, recipe.training)
        checked(model, recipe.training, gate, recipe.losses, evaluated=evaluated, **choices)

    def start(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        plan: TrainingPlan | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        evaluate: Evaluate | None = None,
        gate: Gate | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> Finetuned:
        """Train an extended model and save it; see `finetune`.

        Args:
            model: with the method in place (`extend`).
            tokenizer: its tokenizer.
            plan: from `plan`, if that was asked for before.
            teacher: the original, where the recipe distils (`losses.distillation`).
            evaluate: figures for before, after and between.
            gate: what they decide.
            resume: go on with a run that is there.
            progress: show how it goes.

        Raises:
            ModelError: the tokenizer has ids beyond the model's embeddings.
        """
        refuse_small_vocabulary(model, tokenizer)
        plan = plan or self.plan(tokenizer, self.prepare(tokenizer))
        if self.template is not None:  # it is served with the template that it learns
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = chat_template(tokenizer, self.template).source
        return finetune(
            model,
            tokenizer,
            plan.train_dataset,
            self.recipe.training,
            output_dir=self.output_dir,
            positions=plan.positions,
            losses=self.recipe.losses,
            lora=self.recipe.lora,
            packed=self.recipe.pack,
            shifted=self.recipe.shifted,
            teacher=teacher,
            weights=self.recipe.trained_weights,
            evaluate=evaluate,
            gate=gate,
            resume=resume,
            record=plan.record,
            progress=progress,
        )

    def _record(self, prepared: list[Prepared]) -> Mapping[str, Any]:
        reports = [part.report for part in prepared]
        return {
            "data": list(self.data),
            "samples": sum(report.samples for report in reports),
            "supervised": sum(report.supervised for report in reports),
            "content": _digest([part.dataset for part in prepared]),
            "max_length": self.recipe.max_length,
            "overflow": self.recipe.overflow,
            "retrieval": self.recipe.retrieval,
            "template": self.template,
        }


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Rows in the order in which they are learnt."""

    train_dataset: TrainDataset
    positions: Positions
    updates: int
    rows: int
    """Of an update, over all processes."""
    about: str
    """Where rows come from."""
    record: Mapping[str, Any]
    """What makes the data what they are, to be compared on resume."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        record: Mapping[str, Any],
    ) -> TrainingPlan:
        """Pack a dataset or draw from it, for as many updates as the recipe says.

        Where it says epochs, the last update is filled up from the next pass.
        """
        training, rows = recipe.training, rows_per_update(recipe.training)
        tokens = sum(dataset["length"])
        if not recipe.drawn:
            whole = pack(dataset, recipe.row_tokens) if recipe.pack else dataset
            updates = training.max_steps or math.ceil(training.epochs * len(whole) / rows)
            train_dataset: TrainDataset = Epochs(whole, updates * rows, seed=training.seed)
            room = len(whole) * recipe.row_tokens
            about = f"{len(whole):,} rows a pass, {tokens / room:.0%} full"
            return cls(train_dataset, recipe.policy(updates), updates, rows, about, record)
        row = recipe.max_length * (1 - recipe.retrieval)
        updates = training.max_steps or math.ceil(training.epochs * tokens / row / rows)
        policy = recipe.policy(updates)
        bos = bos_of(tokenizer)
        shares = [
            MixtureWeight(
                "data", DocumentSource(dataset, keep=bos[0] if bos else None), 1 - recipe.retrieval
            )
        ]
        if recipe.retrieval:
            keys = Passkeys(tokenizer, held_in())
            shares.append(MixtureWeight("retrieval", keys, recipe.retrieval))
        train_dataset = Mixture(
            shares,
            rows=updates * rows,
            rows_per_step=rows,
            row_tokens=recipe.max_length,
            positions=policy,
            seed=training.seed,
        )
        about = f"{recipe.max_length:,} tokens each, drawn at the update's length"
        return cls(train_dataset, policy, updates, rows, about, record)

    def __str__(self) -> str:
        return f"{self.updates:,} updates of {self.rows:,} rows; {self.about}"


def _digest(datasets: list[Dataset]) -> str:
    """Of all token ids and labels: whether they are the same in a resumed run."""
    digest = hashlib.sha256()
    for dataset in datasets:
        for name in ("input_ids", "labels"):
            for row in dataset.with_format("numpy")[name]:
                digest.update(row.tobytes())
    return digest.hexdigest()[:16]
