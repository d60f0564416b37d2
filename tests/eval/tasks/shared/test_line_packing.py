"""Whole lines to an exact number of tokens."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

from longctx.errors import DataError
from longctx.eval.tasks.shared import line_packing

from ...conftest import byte_tokenizer


def test_examples() -> None:
    assert doctest.testmod(line_packing).failed == 0


def test_blocks_are_cut_between_lines() -> None:
    texts = ["a\nb\n", "c\n", "dd\ne\n"]
    found = line_packing.cut(byte_tokenizer(), texts)
    assert [byte_tokenizer().decode(list(ids)) for ids in found] == texts


def test_sums() -> None:
    assert line_packing.exact([], 0) == ()
    assert line_packing.exact([3, 3], 4) is None
    assert line_packing.fit([3, 3], 7) is None
    assert line_packing.fit([5, 5], 4) is None


def test_a_tokenizer_that_joins_lines_is_refused() -> None:
    joining: Any = byte_tokenizer()
    newline = joining.convert_ids_to_tokens(joining("\n", add_special_tokens=False).input_ids)[0]
    joining.add_tokens([f"{newline}x", "\nx"])
    with pytest.raises(DataError, match="joins lines"):
        line_packing.cut(joining, ["x\n", "x\n"])
