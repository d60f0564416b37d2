"""Lines that are appended are on the disk as a whole, and nothing else in the file is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.append_only import AppendOnlyFile
from longctx.errors import RunError


def opened(path: Path) -> AppendOnlyFile:
    return AppendOnlyFile(path, first='{"row": 0', holds="rows")


def test_lines_are_counted_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    file = opened(path)
    assert (file.count, file.lines(), path.read_bytes()) == (0, [], b"")
    file.append('{"row": 0}')
    file.append('{"row": 1}')
    assert (file.count, file.lines()) == (2, [b'{"row": 0}', b'{"row": 1}'])
    with pytest.raises(RunError, match="another process writes to"):
        opened(path)
    file.close()
    assert opened(path).count == 2
    assert [each.name for each in path.parent.iterdir()] == ["rows.jsonl"], "no lock beside it"


def test_a_cut_line_stays_until_the_next_one_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"row": 0}\n{"row"')
    file = opened(path)
    assert (file.count, file.cut, file.lines()) == (1, b'{"row"', [b'{"row": 0}'])
    assert path.read_text() == '{"row": 0}\n{"row"'
    file.append('{"row": 1}')
    assert path.read_text() == '{"row": 0}\n{"row": 1}\n'


def test_half_a_line_that_a_full_disk_took_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    file = opened(path)
    file.append('{"row": 0}')

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"No space left.*goes on after the 1 lines"):
        file.append('{"row": 1, "long": "line"}')
    monkeypatch.undo()
    assert file.lines() == [b'{"row": 0}']
    file.append('{"row": 1}')
    assert path.read_text() == '{"row": 0}\n{"row": 1}\n'


def test_what_others_append_is_not_cut_off(tmp_path: Path) -> None:
    """Where a file system has no locks, two may write."""
    path = tmp_path / "rows.jsonl"
    file = opened(path)
    file.append('{"row": 0}')
    with path.open("a") as other:
        other.write("another's\n")
    file.append('{"row": 1}')
    assert path.read_text() == '{"row": 0}\nanother\'s\n{"row": 1}\n'


@pytest.mark.parametrize("text", ["my notes", '{"rows"'])
def test_the_beginning_of_something_else_is_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(RunError, match="is not a file of rows"):
        opened(path)
    assert path.read_text() == text
