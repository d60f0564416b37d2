"""The collator, packing by TRL, and what a batch must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from longctx.errors import DataError
from longctx.train.data.collate import Collator, check_batch, pack, unpacked_inputs
from longctx.train.positions import PoSE

from ...families import build, tokens


def row(*documents: list[int], **more: Any) -> dict[str, Any]:
    ids = [token for document in documents for token in document]
    return {"input_ids": ids, "labels": ids, "seq_lengths": [len(d) for d in documents], **more}


def test_a_packed_and_a_short_row() -> None:
    collate = Collator(pad_id=9, multiple=4)
    batch = collate([row([5, 6, 7], [8, 4]), {"input_ids": [3, 2], "labels": [-100, 2]}])
    check_batch(batch)
    wanted = {
        "input_ids": [[5, 6, 7, 8, 4, 9, 9, 9], [3, 2, 9, 9, 9, 9, 9, 9]],
        "labels": [[-100, 6, 7, -100, 4] + [-100] * 3, [-100, 2] + [-100] * 6],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]],
        "document_ids": [[0, 0, 0, 1, 1, -1, -1, -1], [0, 0] + [-1] * 6],
    }
    assert {name: value.tolist() for name, value in batch.items()} == wanted


def test_a_document_stands_where_it_stands_packed_or_alone() -> None:
    one, two = tokens(20, seed=1)[0].tolist(), tokens(30, seed=2)[0].tolist()
    collate = Collator(PoSE(window=32, target=1000))
    packed = collate([row(one, two)])["position_ids"][0]
    alone = collate([row(two), row(one)])["position_ids"]
    assert packed.tolist() == [*alone[1, :20].tolist(), *alone[0].tolist()]
    assert (packed[:20].diff() > 1).any()
    assert (packed[20:].diff() > 1).any()


def test_seed_and_draw_choose_other_positions() -> None:
    document = tokens(32)[0].tolist()
    policy = PoSE(window=32, target=100_000)

    def place(seed: int, **more: Any) -> list[int]:
        return Collator(policy, seed=seed)([row(document, **more)])["position_ids"][0].tolist()

    assert place(0) == place(0) == place(0, draw=0)
    assert len({tuple(p) for p in (place(0), place(1), place(0, draw=1))}) == 3


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"input_ids": [1, 2]}, "no labels"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 tokens, 1 labels"),
        ({"input_ids": [1, 2], "labels": [1, 2], "seq_lengths": [1]}, "add up"),
        ({"input_ids": [], "labels": []}, "0 tokens"),
    ],
)
def test_rows_that_do_not_add_up_are_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        Collator()([bad])


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return Collator()([row([5, 6, 7], [8, 4]), row([1, 2, 3, 4])])


@pytest.mark.parametrize("name", ["input_ids", "labels", "position_ids", "document_ids"])
def test_a_batch_without_a_tensor_is_refused(batch: dict[str, Tensor], name: str) -> None:
    del batch[name]
    with pytest.raises(DataError, match=f"without {name}.*never guessed"):
        check_batch(batch)


@pytest.mark.parametrize(
    "numbers",
    [[0, 0, 1, 1, 0], [0, 0, 2, 2, 2], [1, 1, 2, 2, 2], [-1, 0, 0, 1, 1], [0, 0, -1, 1, 1],
     [0, 0, -1, 0, 0], [-1, -1, -1, -1, -1]],
)  # fmt: skip
def test_documents_in_pieces_are_refused(batch: dict[str, Tensor], numbers: list[int]) -> None:
    batch["document_ids"][0] = torch.tensor(numbers)
    batch["labels"][:] = -100
    with pytest.raises(DataError, match="one piece"):
        check_batch(batch)


def test_a_label_across_documents_is_refused(batch: dict[str, Tensor]) -> None:
    batch["labels"][0, 3] = 8
    with pytest.raises(DataError, match="continuation of the document before"):
        check_batch(batch)


def test_shapes_are_compared(batch: dict[str, Tensor]) -> None:
    batch["position_ids"] = batch["position_ids"][:, :3]
    with pytest.raises(DataError, match="shapes"):
        check_batch(batch)


def test_packing_keeps_every_document_whole() -> None:
    lengths = [50, 7, 31, 60, 12, 3, 44, 25, 9, 64]
    documents = [tokens(length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    source = Dataset.from_list(
        [{"input_ids": d, "labels": d, "length": len(d), "record": 1} for d in documents]
    )
    packed = pack(source, 64)
    assert sorted(packed.column_names) == ["input_ids", "labels", "seq_lengths"]
    found: list[list[int]] = []
    for line in packed:
        assert isinstance(line, dict)
        assert len(line["input_ids"]) <= 64
        pieces = torch.tensor(line["input_ids"]).split(line["seq_lengths"])
        found += [piece.tolist() for piece in pieces]
        assert line["labels"] == line["input_ids"]
    assert sorted(found) == sorted(documents)
    assert len(packed) == 5  # ⌈305 / 64⌉: no packing has fewer rows


def test_packing_refuses_to_truncate() -> None:
    source = Dataset.from_list([{"input_ids": [1] * 65, "labels": [1] * 65}])
    with pytest.raises(DataError, match=r"65 tokens in rows of 64.*max_length=64"):
        pack(source, 64)


def test_unpacked_inputs_keep_transformers_from_guessing() -> None:
    model = build("llama")
    documents = [tokens(24, seed=1)[0].tolist(), tokens(20, seed=2)[0].tolist()]
    batch = Collator(PoSE(window=24, target=60))([row(d) for d in documents])
    with torch.no_grad():
        found = model(**unpacked_inputs(batch)).logits
        guessed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        # The plain way to the same: every token sees those before it, by an explicit 4D mask.
        causal = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
        wanted = model(
            input_ids=batch["input_ids"][:1],
            position_ids=batch["position_ids"][:1],
            attention_mask=causal,
        ).logits
    torch.testing.assert_close(found[:1], wanted)
    assert (guessed[0] - wanted[0]).abs().max() > 0.1


def test_unpacked_inputs_refuse_packed_rows(batch: dict[str, Tensor]) -> None:
    with pytest.raises(DataError, match=r"2 documents.*packed_attention"):
        unpacked_inputs(batch)
