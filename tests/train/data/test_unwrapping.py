"""Records that a file keeps in one object."""

from __future__ import annotations

from typing import Any

import pytest

from longctx.errors import DataError
from longctx.train.data.unwrapping import unwrapped

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PAIRS = [{"instruction": "a", "output": "c"}, {"instruction": "b", "output": "d"}]


def out_of(record: Any, split: str = "train") -> tuple[list[Any], list[str]]:
    notes: list[str] = []
    return list(unwrapped(record, split, "a.json", notes.append)), notes


@pytest.mark.parametrize(
    "record",
    [
        CHAT,
        PAIRS[0],
        {"text": "a"},
        {"messages": []},
        {"anything": 1},
        {"prompt": CHAT["messages"], "completion": CHAT["messages"][1:]},
        {**PAIRS[0], "history": [["a", "b"]]},
        5,
        None,
    ],
)
def test_a_record_is_itself(record: Any) -> None:
    assert out_of(record) == ([record], [])


def test_a_list_under_any_name_and_one_for_each_split() -> None:
    assert out_of({"data": [CHAT, CHAT]}) == ([CHAT, CHAT], [])
    rows, notes = out_of({"version": 1, "examples": PAIRS})
    assert (rows, notes) == (PAIRS, ["fields of the file that are not used: 'version'"])
    both = {"train": [CHAT], "test": [PAIRS[0]]}
    assert out_of(both) == ([CHAT], [])
    assert out_of(both, "test") == ([PAIRS[0]], [])
    with pytest.raises(DataError, match="no list 'sft', and has 'train', 'test': pass one"):
        out_of(both, "sft")


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": ["a", "b"], "output": ["c", "d"]},
        {"instruction": {"0": "a", "1": "b"}, "output": {"0": "c", "1": "d"}},
    ],
)
def test_columns(record: Any) -> None:
    assert out_of(record) == (PAIRS, [])
    with pytest.raises(DataError, match="columns of unequal length"):
        out_of({**record, "output": ["c"]})


def test_columns_of_conversations_keep_their_numbers() -> None:
    said = CHAT["messages"]
    rows, _ = out_of({"messages": [said, said], "id": [1, 2]})
    assert rows == [{"messages": said, "id": 1}, {"messages": said, "id": 2}]
