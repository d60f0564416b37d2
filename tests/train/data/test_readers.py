"""Records out of every kind of file, and every way in which a file can be broken."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from longctx.errors import DataError
from longctx.train.data import readers
from longctx.train.data.readers import SAMPLE, Records

CHATS: list[dict[str, Any]] = [
    {
        "id": number,
        "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "y"}],
    }
    for number, text in enumerate(["plain", 'quoted " \\ \u00e9\u65e5\U0001f600', "]}, [{", ""])
]
ARRAY = json.dumps(CHATS, ensure_ascii=False, indent=2)
LINES = "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in CHATS)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture(params=[5, 64, 1 << 22])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that end within records, within characters, and that hold the whole file."""
    monkeypatch.setattr(readers, "_CHUNK", request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ARRAY.encode()),
        ("bom.json", b"\xef\xbb\xbf" + ARRAY.encode()),
        ("a.jsonl", LINES.encode()),
        ("a.ndjson", LINES.rstrip().encode()),
        ("lines.json", LINES.encode()),
        ("a.json.gz", gzip.compress(ARRAY.encode(), mtime=0)),
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
    ],
)
def test_json(tmp_path: Path, name: str, content: bytes) -> None:
    records = Records(write(tmp_path / name, content))
    assert list(records) == CHATS
    assert records.notes == []


def test_parquet_text_folders_and_saved_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    parquet.write_table(pyarrow.Table.from_pylist(CHATS), tmp_path / "a.parquet")
    assert list(Records(tmp_path / "a.parquet")) == CHATS
    assert list(Records(write(tmp_path / "a.txt", "One.\nTwo.\n"))) == [{"text": "One.\nTwo.\n"}]
    shards = tmp_path / "shards"
    shards.mkdir()
    write(shards / "train.jsonl", LINES)
    assert list(Records(shards)) == CHATS
    with pytest.raises(DataError, match="shards', split 'test'"):
        list(Records(shards, split="test"))
    saved = datasets.Dataset.from_list(CHATS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "dict")
    assert list(Records(tmp_path / "one")) == list(Records(tmp_path / "dict")) == CHATS


def test_a_hub_id_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, **settings: Any) -> list[dict[str, Any]]:
        asked.append((name, settings))
        return CHATS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(Records("some-org/chats.v1", split="test")) == CHATS
    assert asked == [("some-org/chats.v1", {"split": "test"})]


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("name", "text"), [("a.json", ARRAY), ("a.jsonl", LINES)])
def test_a_file_cut_off_anywhere(tmp_path: Path, name: str, text: str) -> None:
    raw = text.encode()
    # Where records begin and end, found by writing them one by one.
    ends: list[tuple[int, int]] = []
    for chat in CHATS:
        piece = json.dumps(chat, ensure_ascii=False, indent=2 if name == "a.json" else None)
        piece = piece.replace("\n", "\n  ") if name == "a.json" else piece
        start = raw.index(piece.encode(), ends[-1][1] if ends else 0)
        ends.append((start, start + len(piece.encode())))
    for cut in range(2, len(raw) - 2, 7):
        whole = sum(end <= cut for _, end in ends)
        begun = [start for start, end in ends if start < cut < end]
        path = write(tmp_path / name, raw[:cut])
        salvaged = Records(path, salvage=True)
        if not begun and name == "a.jsonl":  # between two lines nothing tells
            assert list(salvaged) == CHATS[:whole]
            assert not salvaged.notes
            continue
        with pytest.raises(DataError) as raised:
            list(Records(path))
        assert f"after {whole} whole records" in str(raised.value)
        assert "--salvage" in str(raised.value)
        if begun:
            assert f"begins at byte {begun[0]:,}." in str(raised.value)
        if whole:
            assert list(salvaged) == CHATS[:whole]
            (note,) = salvaged.notes
            assert f"salvaged {whole} whole records" in note


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "a.json holds no records"),
        ("a.json", b"[]", "holds no records"),
        ("a.txt", b" \n", "holds no records"),
        ("a.json", b"[1, 2]", "record 1 is 1: expected an object"),
        ("a.json", b'[{"a": 1}]\n\n[{"a": 2}]', "goes on after its closing ']' at byte 12:"),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": oops, "and so on": 1}\n',
            "not JSON at byte 15, in record 2",
        ),
        ("a.json", b'[{"a": "line\nbreak, and more text"}]', "not JSON at byte 12, in record 1"),
        ("a.jsonl", b'{"a": "\xc3\xa9"}\n{"a": "\xff"}', "not UTF-8 text at byte 19:"),
        ("a.jsonl", b'{"a": "ab\xe6\xff"}', "not UTF-8 text at byte 9:"),
        ("a.jsonl", b'{"a": 1}\n\xe6', "breaks off: after 1 whole records"),
        ("a.txt", b"abc\xfe", "not UTF-8 text at byte 3:"),
        ("a.parquet", b"PAR1 and no more", "not a complete parquet file.*nothing can be salvaged"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:60], "does not decompress"),
        ("a.jsonl.xz", b"no xz at all", "does not decompress"),
        ("a.csv", b"a,b", "the ending '.csv' is not known; use .json, .jsonl"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(Records(write(tmp_path / name, content)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": ' + "[" * 100_000, "not JSON at byte 0, in record 1: maximum recursion depth"),
        ('{"a": ' + "9" * 5_000 + "}", "not JSON at byte 0, in record 1: Exceeds the limit"),
        ('{"a": ' + "[" * 900 + "]" * 900 + "}\n5", "record 2 is 5: expected an object"),
    ],
)
def test_json_that_python_does_not_take(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^a.jsonl.*{message}"):
        list(Records(write(tmp_path / "a.jsonl", content)))


def test_bad_lines_can_be_stepped_over(tmp_path: Path) -> None:
    lines = ["5", '{"a": oops, "and so on": 1}', '{"a": ' + "9" * 5_000 + "}", '{"text": "b"}']
    records = Records(write(tmp_path / "a.jsonl", "\n".join(lines)), skip_bad=True)
    found = list(records)
    assert [getattr(each, "reason", None) for each in found] == [
        "not an object",
        *["not JSON"] * 2,
        None,
    ]
    assert found[-1] == {"text": "b"}


@pytest.mark.parametrize("cut", ['{"text": "b"', '{"text": "b", "more": [{"x": 1},'])
def test_a_bad_line_costs_no_other(tmp_path: Path, cut: str) -> None:
    """The parser finds the fault of a line that is not closed on the one after it."""
    lines = ['{"text": "a"}', cut, *(f'{{"text": "{letter}"}}' for letter in "cde")]
    records = Records(write(tmp_path / "a.jsonl", "\n".join(lines)), skip_bad=True)
    found = [getattr(each, "reason", each) for each in records]
    assert found == [{"text": "a"}, "not JSON", *({"text": letter} for letter in "cde")]


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(CHATS)
    datasets.DatasetDict({"train_sft": saved}).save_to_disk(tmp_path / "dict")
    with pytest.raises(DataError, match="no split 'train', and has 'train_sft': pass one"):
        list(Records(tmp_path / "dict"))
    assert list(Records(tmp_path / "dict", split="train_sft")) == CHATS


def test_what_arrow_fills_up_is_not_there(tmp_path: Path) -> None:
    chats = [{"tools": [{"a": 1}]}, {"tools": [{"b": {"c": 2}}]}]
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "a.parquet")
    assert list(Records(tmp_path / "a.parquet")) == chats


def test_not_there() -> None:
    with pytest.raises(DataError, match="does not exist: expected a file, a folder or a hub id"):
        list(Records("./nowhere/chats.json"))


def test_a_fifo_is_told_from_what_is_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "chats.jsonl")
    with pytest.raises(DataError, match="is not a regular file"):
        list(Records(tmp_path / "chats.jsonl"))


def test_the_sample_set_is_there() -> None:
    assert len(list(Records(SAMPLE))) == 200
