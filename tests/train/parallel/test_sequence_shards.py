"""Batches in pieces: every token once, with the label of the next one; rows dealt out in order."""

from __future__ import annotations

import pytest
import torch

from longctx.errors import RunError
from longctx.train.data.collate import Collator
from longctx.train.parallel.sequence_shards import (
    SharedRows,
    model_inputs,
    sequence_shard,
    whole_inputs,
)

from ..engine.test_finetune import Noise


def test_the_pieces_are_the_whole() -> None:
    batch = Collator(multiple=4)([Noise(2, (62,))[0], Noise(2, (58,))[1]])
    whole = whole_inputs(batch)
    parts = [sequence_shard(whole, rank, 4) for rank in range(4)]
    assert {part["input_ids"].shape for part in parts} == {(2, 16)}
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), tensor)
    assert torch.equal(whole["shift_labels"][:, :-1], batch["labels"][:, 1:])
    assert bool((whole["shift_labels"][:, -1] == -100).all())
    for part in parts:
        inputs = model_inputs(part)
        assert inputs["labels_aligned"]
        assert torch.equal(inputs["labels"], part["shift_labels"])
        assert bool(inputs["attention_mask"].all())


def test_documents_in_a_row_need_attention_that_is_told_of_them() -> None:
    batch = Collator()([Noise(1)[0]])
    with pytest.raises(RunError, match="several documents"):
        whole_inputs(batch)
    assert whole_inputs(batch, packed=True)["input_ids"].shape == (1, 64)


@pytest.mark.parametrize(
    ("processes", "size", "batch"), [(2, 2, 1), (4, 2, 1), (4, 2, 3), (6, 3, 2)]
)
def test_each_group_gets_the_rows_that_a_process_of_its_own_would(
    processes: int, size: int, batch: int
) -> None:
    """accelerate deals batch i to process i mod their number."""
    train_dataset = Noise(24)
    shared = SharedRows(train_dataset, size, batch)
    groups = processes // size
    dealt = [shared[index]["input_ids"] for index in range(len(shared))]
    batches = [dealt[first : first + batch] for first in range(0, len(dealt), batch)]
    rows = [train_dataset[index]["input_ids"] for index in range(24)]
    for rank in range(processes):
        own = [row for one in batches[rank::processes] for row in one]
        mine = [index for index in range(24) if index // batch % groups == rank // size]
        assert own == [rows[index] for index in mine]
    assert shared.shares == train_dataset.shares
