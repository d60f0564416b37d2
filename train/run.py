"""A recipe with data and a folder: from a loaded model to one that serves, in one call.

    run = Run(LONGCHAT_16K, data=("chats.json",), output=Path("runs/x"))
    run.extend(model)
    done = run.start(model, tokenizer)

The model is extended first, so that what cannot be put on is refused before any data is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.core import extend
from longctx.errors import RunError
from longctx.methods import parse_method

from .batch import pack
from .contract import reach
from .data import Prepared, prepare
from .encode import Settings
from .feed import Epochs, Feed, Mixture, Rows, Share
from .finetune import Finetuned, finetune
from .positions import Positions
from .recipes import Recipe
from .retrieval import Passkeys, training_text
from .settings import Gate

if TYPE_CHECKING:
    from datasets import Dataset

    from .trainer import Evaluate

__all__ = ["Run"]


@dataclass(frozen=True, slots=True)
class Run:
    """A recipe, data for it, and where it goes."""

    recipe: Recipe
    data: tuple[str, ...]
    """Sources that `data.prepare` reads, one after the other."""
    output: Path
    """Folder of the run."""
    template: str | None = None
    """Chat template; see `encode.Settings`."""
    strict: bool = False
    """Refuse conversations out of order instead of tidying them."""
    salvage: bool = False
    """Go on with the whole records of a file that breaks off."""
    split: str = "train"
    """Of a hub id."""
    workers: int = 1
    """Processes that tokenise."""

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[Prepared]:
        """Read, render, tokenise and label the data.

        Raises:
            DataError: what cannot be read or understood.
        """
        settings = Settings(
            max_length=self.recipe.document_tokens,
            overflow=self.recipe.overflow,
            template=self.template,
            strict=self.strict,
        )
        if not self.data:
            raise RunError("no data: pass files, folders or hub ids, or sample.")
        options: dict[str, Any] = {"salvage": self.salvage, "split": self.split}
        return [
            prepare(source, tokenizer, settings, workers=self.workers, **options)
            for source in self.data
        ]

    def extend(self, model: PreTrainedModel, *, replace: bool = False) -> None:
        """Put the method on, unless the model brings a patch and the recipe says none.

        Raises:
            MethodError: it cannot be put on.
            RunError: rows longer than the extended window.
        """
        method = parse_method(self.recipe.method)
        if method is not None:
            extend(model, method, replace=replace)
        known = reach(model)
        if known is not None and self.recipe.max_length > known:
            raise RunError(
                f"max_length={self.recipe.max_length:,} is beyond the {known:,} tokens of the "
                f"patched window ({self.recipe.method}): pass a larger factor, a target, or a "
                "shorter length."
            )

    def start(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prepared: list[Prepared] | None = None,
        *,
        processes: int = 1,
        evaluate: Evaluate | None = None,
        gate: Gate | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> Finetuned:
        """Train an extended model and save it; see `finetune`.

        Args:
            model: with the method in place (`extend`).
            tokenizer: its tokenizer.
            prepared: what `prepare` gave, if that was asked for before.
            processes: that hold rows of their own (world size / (cp · sp)).
            evaluate: figures for before, after and between.
            gate: what they decide.
            resume: go on with a run that is there.
            progress: show how it goes.
        """
        from datasets import concatenate_datasets

        prepared = prepared or self.prepare(tokenizer)
        dataset = concatenate_datasets([part.dataset for part in prepared])
        rows, steps = self._sizes(dataset, processes)
        policy = self.recipe.policy(steps)
        return finetune(
            model,
            tokenizer,
            self._feed(dataset, tokenizer, rows, steps, policy),
            self.recipe.training,
            output=self.output,
            positions=policy,
            losses=self.recipe.losses,
            lora=self.recipe.lora,
            packed=self.recipe.pack,
            shifted=self.recipe.shifted,
            evaluate=evaluate,
            gate=gate,
            resume=resume,
            record=self._record(prepared),
            progress=progress,
        )

    def _sizes(self, dataset: Dataset, processes: int) -> tuple[int, int]:
        training = self.recipe.training
        each = training.batch_size * training.accumulate * processes
        if training.steps is not None:
            return training.steps * each, training.steps
        tokens = sum(dataset["length"])
        per_row = self.recipe.max_length if self.recipe.pack else tokens / len(dataset)
        steps = max(
            1, round(training.epochs * tokens / per_row / (1 - self.recipe.retrieval) / each)
        )
        return steps * each, steps

    def _feed(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        steps: int,
        policy: Positions,
    ) -> Feed:
        recipe, training = self.recipe, self.recipe.training
        if not recipe.drawn:
            whole = pack(dataset, recipe.max_length) if recipe.pack else dataset
            return Epochs(whole, rows, seed=training.seed)
        bos: Any = tokenizer.bos_token_id
        shares = [Share("data", Rows(dataset, keep=bos), 1 - recipe.retrieval)]
        if recipe.retrieval:
            keys = Passkeys(tokenizer, training_text())
            shares.append(Share("retrieval", keys, recipe.retrieval))
        return Mixture(
            shares,
            rows=rows,
            rows_per_step=rows // steps,
            row_tokens=recipe.max_length,
            positions=policy,
            seed=training.seed,
        )

    def _record(self, prepared: list[Prepared]) -> Mapping[str, Any]:
        reports = [part.report for part in prepared]
        return {
            "data": list(self.data),
            "samples": sum(report.samples for report in reports),
            "supervised": sum(report.supervised for report in reports),
            "max_length": self.recipe.max_length,
            "overflow": self.recipe.overflow,
            "retrieval": self.recipe.retrieval,
            "template": self.template,
        }
