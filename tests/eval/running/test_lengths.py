"""Lengths as people write them, and what is not a length."""

from __future__ import annotations

import pytest

from longctx.errors import RunError
from longctx.eval import parse_lengths


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("256:4096", (256, 512, 1024, 2048, 4096)),
        ("4k,8k,12k", (4096, 8192, 12288)),
        ("1k:3000", (1024, 2048, 3000)),
        ("512:512", (512,)),
        (" 2K , 1024,2048", (1024, 2048)),
        ([4096, 256, 4096], (256, 4096)),
        (["256:1k", "8k"], (256, 512, 1024, 8192)),
        (["4k,8k", 100], (100, 4096, 8192)),
    ],
)
def test_lengths_are_read(text: str | list[int | str], lengths: tuple[int, ...]) -> None:
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4m", "'4m' is not a length: expected tokens such as 4096 or 4k"),
        ("4k,,8k", "'' is not a length"),
        ("", "'' is not a length"),
        ("-512", "'-512' is not a length"),
        ("1.5k", "'1.5k' is not a length"),
        ("256:", "'256:' is not a length"),
        ("4k:1k", "length range '4k:1k' goes down"),
        ("7", "7 tokens is too short: expected at least 8"),
        ([0], "0 tokens is too short"),
        ([], "names no length"),
    ],
)
def test_what_is_no_length_is_named(text: str | list[int | str], message: str) -> None:
    with pytest.raises(RunError, match=message):
        parse_lengths(text)
