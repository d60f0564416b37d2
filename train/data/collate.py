"""Batches that say which document each token belongs to, and packing several into a row.

    rows = pack(prepared.dataset, 16_384)                   # best fit decreasing, nothing truncated
    collate = Collator(PoSE(2048, 16_384), pad_id=tokenizer.pad_token_id)
    batch = collate([rows[0], rows[1]])

A batch holds int64 tensors [B, S]:

    input_ids     tokens, padded on the right
    labels        a token's own id where it is learnt, −100 elsewhere; the first token of a document
                  is never learnt, since what stands before it is another document
    position_ids  from the policy, for each document on its own
    document_ids  0, 1, … along the row, −1 at padding
    kind_ids      where rows are mixed from several sources: the number of each token's source

Attention masks are made from `document_ids` alone (`packed_attention.PackedAttention.inputs`, or
`unpacked_inputs` where each row is one document), never guessed from positions.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longctx.errors import DataError, RunError

from ..positions import FullLength, Positions
from .tokenize import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["PADDING", "Collator", "check_batch", "pack", "unpacked_inputs"]

PADDING = -1
"""The document id of padding."""
_NAMES = ("input_ids", "labels", "position_ids", "document_ids")


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes a batch of rows; the same rows give the same batch, in any order and any process.

    A row holds `input_ids`, `labels` and, where packed, `seq_lengths` (tokens of each document, as
    `pack` writes them) and `kinds` (of each document, as `sampling.Mixture` writes them). A column
    `draw`, a number, chooses other positions for the same document: the epoch, say.
    """

    positions: Positions = field(default_factory=FullLength)
    """Where the tokens of each document stand."""
    pad_id: int = 0
    """Token at padding; any, since nothing sees it and it is not learnt."""
    multiple: int = 1
    """Rows are padded to a multiple of so many tokens (2·cp_size under context parallel)."""
    seed: int = 0
    """Chooses the positions, together with the document's own tokens."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate.

        Raises:
            DataError: a row without tokens or labels, or whose lengths do not add up.
        """
        made = [self._row(row) for row in rows]
        longest = max(len(row["input_ids"]) for row in made)
        size = -(-longest // self.multiple) * self.multiple
        blank = {"input_ids": self.pad_id, "labels": IGNORED, "document_ids": PADDING}
        batch = {name: torch.full((len(made), size), blank.get(name, 0)) for name in made[0]}
        for index, row in enumerate(made):
            end = len(row["input_ids"])
            for name, tensor in batch.items():
                tensor[index, :end] = row[name]
            # In steps of one, like a document's: a repeated position would look like a jump.
            batch["position_ids"][index, end:] = torch.arange(size - end)
        return batch

    def _row(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        if "labels" not in row:
            raise DataError(
                f"a row with columns {sorted(row)} and no labels: prepare the data with "
                "longctx.train.data.preparation.prepare, which says what is learnt."
            )
        ids, labels = (np.array(row[name], dtype=np.int64) for name in ("input_ids", "labels"))
        found: Any = row.get("seq_lengths")
        lengths = [len(ids)] if found is None else [int(length) for length in found]
        if len(ids) != len(labels) or sum(lengths) != len(ids) or min(lengths, default=0) < 1:
            raise DataError(
                f"a row of {len(ids)} tokens, {len(labels)} labels and documents of {lengths} "
                "tokens: expected as many labels as tokens, in documents that add up to them."
            )
        starts = np.cumsum([0, *lengths])
        labels[starts[:-1]] = IGNORED
        draw = int(row.get("draw", 0))
        places = [self._place(ids[a:b], draw) for a, b in pairwise(starts)]
        made = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.cat(places),
            "document_ids": torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        }
        if "kinds" in row:
            made["kind_ids"] = torch.from_numpy(np.repeat(np.array(row["kinds"]), lengths))
        return made

    def _place(self, ids: np.ndarray[Any, Any], draw: int) -> Tensor:
        rng = np.random.default_rng([self.seed, draw, zlib.crc32(ids.tobytes())])
        return self.positions.place(len(ids), rng)


def pack(dataset: Dataset, length: int) -> Dataset:
    """Put several documents into each row of at most `length` tokens, best fit decreasing, by TRL.

    Args:
        dataset: columns input_ids and labels; others are left out.
        length: most tokens of a row.

    Returns:
        Columns input_ids, labels and seq_lengths (tokens of each document), in another order.

    Raises:
        DataError: a document longer than `length`, which TRL would truncate without a word.
        RunError: TRL is not installed.
    """
    try:
        from trl.data_utils import pack_dataset
    except ImportError as error:
        raise RunError(
            "packing is TRL's: pip install 'longctx-toolkit[train]', or train without packing."
        ) from error
    rows = dataset.select_columns(["input_ids", "labels"])
    longest = max((len(ids) for ids in rows.with_format("numpy")["input_ids"]), default=0)
    if longest > length:
        raise DataError(
            f"a document of {longest:,} tokens in rows of {length:,}: prepare the data with "
            f"max_length={length}, or pack into rows of at least {longest}."
        )
    return pack_dataset(rows, length, strategy="bfd")


def check_batch(batch: Mapping[str, Tensor]) -> None:
    """Refuse a batch from which no right mask can be made.

    Raises:
        DataError: a tensor that is missing or of another shape, documents in pieces, a first token
            that is learnt.
    """
    missing = [name for name in _NAMES if name not in batch]
    if missing:
        raise DataError(
            f"a batch without {', '.join(missing)}: masks are made from document_ids, never "
            "guessed from positions. Batch with longctx.train.data.collate.Collator, and let the "
            "trainer keep the columns (remove_unused_columns=False)."
        )
    shapes = {name: tuple(batch[name].shape) for name in _NAMES}
    if len(set(shapes.values())) != 1 or batch["input_ids"].ndim != 2:
        raise DataError(f"a batch of shapes {shapes}: expected [batch, tokens] for each.")
    ids, labels = batch["document_ids"], batch["labels"]
    steps = ids.diff(dim=1)
    real = ids != PADDING
    onward = (steps == 0) | ((steps == 1) & real[:, :-1]) | ~real[:, 1:]
    if not bool(onward.all() & (ids[:, 0] == 0).all()):
        raise DataError(
            "document_ids that go back or skip: expected 0, 1, … along each row, each document in "
            "one piece, and then −1 for padding on the right."
        )
    if bool(((steps != 0) & (labels[:, 1:] != IGNORED)).any()):
        raise DataError(
            "the first token of a packed document has a label: it would be learnt as the "
            f"continuation of the document before it. Set it to {IGNORED}."
        )


def unpacked_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a model is called with where each row is one document: any attention can take it.

    The mask is always there, for positions that jump would be taken for packed documents without.

    Raises:
        DataError: a row with several documents, or what `check_batch` refuses.
    """
    check_batch(batch)
    ids = batch["document_ids"]
    if bool((ids > 0).any()):
        raise DataError(
            f"a row of {int(ids.max()) + 1} documents and attention that keeps none apart: call "
            "the model with packed_attention(model).inputs(batch), from "
            "longctx.train.engine.packed_attention."
        )
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": (ids != PADDING).long(),
        "use_cache": False,
    }
