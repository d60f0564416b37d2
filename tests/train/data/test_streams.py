"""Compressed files: every ending, cut off, and made to burst."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow
import pytest

from longctx.errors import DataError
from longctx.train.data import readers, streams
from longctx.train.data.readers import Records


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstd,
    ".GZ": gzip.compress,
    "": bytes,
}
RECORDS = [{"text": Random(i).randbytes(500).hex()} for i in range(2_000)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@pytest.mark.parametrize("ending", PACKERS)
def test_every_ending(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"A.JSONL{ending}"
    path.write_bytes(PACKERS[ending](LINES))
    assert list(Records(path)) == RECORDS


@pytest.mark.parametrize("ending", [".gz", ".xz", ".bz2", ".zst"])
def test_a_cut_file_is_salvaged_up_to_its_last_whole_record(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    packed = PACKERS[ending](LINES)
    path.write_bytes(packed[: len(packed) * 3 // 4])
    with pytest.raises(DataError, match=r"a.jsonl.* does not decompress: .*--salvage"):
        list(Records(path))
    salvaged = Records(path, salvage=True)
    found = list(salvaged)
    assert 0 < len(found) < len(RECORDS)
    assert found == RECORDS[: len(found)]
    assert f"salvaged {len(found):,} whole records" in salvaged.notes[0]


def test_a_file_that_bursts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_HARMLESS", 1_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 10_000_000))
    with pytest.raises(DataError, match=r"decompresses to more than .* over 200 times its size"):
        list(Records(path))


def test_a_record_and_a_text_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST", 1_000)
    monkeypatch.setattr(readers, "_CHUNK", 64)
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps({"text": "a" * 5_000}).encode())
    with pytest.raises(DataError, match="a record of more than 1,000 characters at byte 0"):
        list(Records(path))
    (tmp_path / "a.txt").write_text("a" * 1_001)
    with pytest.raises(DataError, match="a text of over 1,000 bytes"):
        list(Records(tmp_path / "a.txt"))
