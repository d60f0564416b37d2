"""Texts of the user, and the files that hold none."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.errors import DataError
from longctx.eval.tasks.texts import digest, texts_of
from longctx.prompts.passkey_prompts import held_out


def test_a_document_per_file_folders_whole(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "deep" / "a.md").write_text("thïrd", encoding="utf-8")
    (tmp_path / ".hidden").write_bytes(b"\0")
    single = tmp_path.parent / f"{tmp_path.name}.txt"
    single.write_text("first")
    assert texts_of((str(single), str(tmp_path))).documents == ("first", "second", "thïrd")
    assert texts_of(()) is held_out()
    assert digest("a") != digest("b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: pass files with text"),
        (b" \n", "is empty"),
        (b"\x89PNG\xff", r"is not UTF-8 text \(byte 0\)"),
        (b"a\0b", "holds NUL bytes"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts_of((str(path),))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist: expected a text file"):
        texts_of((str(tmp_path / "gone"),))
    with pytest.raises(DataError, match="no files in there"):
        texts_of((str(tmp_path),))


def test_a_file_that_is_edited_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one text")
    assert texts_of((str(path),)).documents == ("one text",)
    path.write_text("another text")
    assert texts_of((str(path),)).documents == ("another text",)
