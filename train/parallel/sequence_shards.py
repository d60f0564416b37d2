"""Sequences in pieces, of which each process that shares them holds one.

    whole = whole_inputs(batch)               # each label at the token that predicts it: the next
                                              # token may be in another shard
    part = sequence_shard(whole, rank, size)  # where heads are exchanged; ring attention cuts
    loss = model(**model_inputs(part), count=count)

There is no mask but causality: a row is one document from its start, or attention is told apart
from it where documents end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from longctx.errors import RunError

from ..data.sampling import TrainDataset
from ..data.tokenize import IGNORED

__all__ = ["SharedRows", "model_inputs", "sequence_shard", "whole_inputs"]


def whole_inputs(batch: Mapping[str, Tensor], *, packed: bool = False) -> dict[str, Tensor]:
    """What is cut of a batch [B, S]: `shift_labels` are the labels of the next tokens.

    Args:
        batch: as `collate.Collator` makes it.
        packed: attention is told where documents end (`PackedAttention.borders`).

    Raises:
        RunError: several documents in a row, and attention that is not told of them.
    """
    if not packed and bool((batch["document_ids"] > 0).any()):
        raise RunError("several documents in a row of which each process has a piece: do not pack.")
    names = ("input_ids", "position_ids", "kind_ids")
    whole = {name: batch[name] for name in names if name in batch}
    whole["shift_labels"] = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return whole


def sequence_shard(whole: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """The part that process `rank` of the `size` holds that share a sequence.

    Args:
        whole: tensors [B, S], S a multiple of `size`.
        rank: among those that share the sequence.
        size: their number.

    Returns:
        Tensors [B, S / size].
    """
    return {name: tensor.chunk(size, dim=1)[rank].contiguous() for name, tensor in whole.items()}


def model_inputs(part: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is called with on a piece; see `loss_forward.LossForward`.

    With a mask of ones: both ways of sharing discard masks, and without one transformers would take
    positions that jump for packed documents and build a mask of S² numbers first.
    """
    inputs = {name: tensor for name, tensor in part.items() if name != "shift_labels"}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return {**inputs, "labels": part["shift_labels"], "labels_aligned": True, "use_cache": False}


class SharedRows(TrainDataset):
    """Each batch as often as there are processes that share it, for a loader that deals them out.

    Args:
        train_dataset: rows.
        size: processes that share a sequence; their ranks follow each other.
        batch: rows of a batch.
    """

    def __init__(self, train_dataset: TrainDataset, size: int, batch: int) -> None:
        self.train_dataset = train_dataset
        self.size = size
        self.batch = batch
        self.shares = train_dataset.shares

    def __len__(self) -> int:
        """Rows of the whole run, each counted for all that share it."""
        return len(self.train_dataset) // self.batch * self.batch * self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` of those that are dealt out."""
        number, place = divmod(index, self.batch)
        return self.train_dataset[number // self.size * self.batch + place]
