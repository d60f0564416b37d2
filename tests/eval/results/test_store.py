"""The results file: read back exactly, mended at its end, refused where it does not belong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from longctx.errors import RunError
from longctx.eval import Observation
from longctx.eval.results.records import Record
from longctx.eval.results.store import Store

IDENTITY = {"model": "m1", "tokenizer": "t1"}


def record(key: str = "k", nll: float = 0.1 + 0.2, failed: str | None = None) -> Record:
    observation = Observation(64, "i", "doc", nll, 5, True, {"depth": 0.5, "key": "123", "x": nll})
    found = () if failed else (observation,)
    return Record(key, "yarn:2", "passkey", (64, 128), 128, 0.25, "whole", found, failed)


def test_what_is_put_is_what_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    kept = Store(path, IDENTITY).put(record())
    assert kept == record()
    again = Store(path, IDENTITY)
    assert again.get("k") == kept
    assert again.get("other") is None
    assert not again.notes


def test_without_a_path_records_stay_in_memory() -> None:
    store = Store(None, IDENTITY)
    store.put(record())
    assert store.get("k") == record()


def test_nan_and_infinity_are_null_in_the_file_and_nan_after(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for value in (math.nan, math.inf):
        kept = Store(path, IDENTITY).put(record(nll=value)).observations[0]
        assert math.isnan(kept.nll)
        assert math.isnan(kept.detail["x"])
    lines = path.read_text().splitlines()
    assert json.loads(lines[1], parse_constant=pytest.fail)["observations"][0]["nll"] is None


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_a_cut_off_last_line_is_dropped_and_said(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    store = Store(path, IDENTITY)
    store.put(record("a"))
    store.put(record("b"))
    path.write_bytes(path.read_bytes()[:-cut])
    store.close()
    again = Store(path, IDENTITY)
    assert again.get("a") == record("a")
    assert again.get("b") is None
    assert "the last line was cut off" in again.notes[0]
    again.put(record("b"))
    again.close()
    third = Store(path, IDENTITY)
    assert third.get("b") == record("b")
    assert not third.notes


def test_a_file_cut_within_its_first_line_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Store(path, IDENTITY)
    path.write_bytes(path.read_bytes()[:10])
    store = Store(path, IDENTITY)
    store.put(record())
    store.close()
    assert Store(path, IDENTITY).get("k") == record()


def test_the_last_of_several_counts_and_failures_are_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    store = Store(path, IDENTITY)
    store.put(record(failed="out of memory"))
    assert store.get("k") is None
    assert store.last("k") == record(failed="out of memory")
    store.put(record())
    store.close()
    assert Store(path, IDENTITY).get("k") == record()


@pytest.mark.parametrize("key", ["model", "tokenizer"])
def test_results_of_another_model_are_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "r.jsonl"
    Store(path, IDENTITY).put(record())
    with pytest.raises(RunError, match=rf"holds the results of another {key} .*name another file"):
        Store(path, IDENTITY | {key: "else"})


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("my notes", "is not a file of results"),
        ("a\nb", "line 1: .* It is not a results file of this release"),
        ('{"a": 1}\n', "line 1: .* It is not a results file of this release"),
        ('{"longctx": "results", "version": 9}\n', "line 1: .* It is not a results file"),
    ],
)
def test_other_files_are_refused_and_kept(tmp_path: Path, first: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(first)
    with pytest.raises(RunError, match=message):
        Store(path, IDENTITY)
    assert path.read_text() == first


@pytest.mark.parametrize("name", ["key", "lengths", "tokens", "failed"])
def test_a_field_of_another_type_is_named_by_its_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "r.jsonl"
    Store(path, IDENTITY).put(record())
    header, good = path.read_text().splitlines()
    spoilt: list[Any] = [{**json.loads(good), name: 1.5}]
    for field, value in (("correct", "yes"), ("nll", "bad"), ("targets", True), ("more", 1)):
        spoilt.append(json.loads(good))
        spoilt[-1]["observations"][0][field] = value
    for line in spoilt:
        path.write_text("\n".join([header, json.dumps(line), ""]))
        with pytest.raises(RunError, match=r"line 2: \S+: expected.* Delete that"):
            Store(path, IDENTITY)


@pytest.mark.parametrize("line", ["[1]", "{}", "nonsense", '{"key": 1}'])
def test_damage_in_the_middle_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r.jsonl"
    Store(path, IDENTITY).put(record())
    header, good = path.read_text().splitlines()
    path.write_text("\n".join([header, line, good, ""]))
    with pytest.raises(RunError, match=r"line 2: .*expected.* Delete that line"):
        Store(path, IDENTITY)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        Store(tmp_path / "file" / "r.jsonl", IDENTITY)


def test_a_full_disk_is_said_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.jsonl"
    store = Store(path, IDENTITY)
    store.put(record("a"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"No space left on device.*goes on after the 2 lines"):
        store.put(record("b"))
    monkeypatch.undo()
    store.close()
    assert Store(path, IDENTITY).get("a") == record("a")


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = Store(path, IDENTITY)
    with pytest.raises(RunError, match=r"another process writes to .*name another"):
        Store(path, IDENTITY)
    first.put(record())
    first.close()
    assert Store(path, IDENTITY).get("k") == record()


def test_processes_of_one_sweep_write_apart_and_read_together(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    stores = [Store(path, IDENTITY, rank=rank, ranks=3) for rank in range(3)]
    for rank, store in enumerate(stores):
        store.put(record(f"k{rank}", nll=rank))
    for store in stores:
        store.reload()
        assert [store.get(f"k{rank}") for rank in range(3)] == [
            record(f"k{rank}", nll=rank) for rank in range(3)
        ]
        store.close()
    assert Store(path, IDENTITY).get("k2") == record("k2", nll=2)
    assert {p.name for p in tmp_path.iterdir() if p.name[0] != "."} == {
        "r.jsonl", "r.1of3.jsonl", "r.2of3.jsonl"
    }  # fmt: skip


def test_a_success_is_not_hidden_by_another_process_failure(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    other = Store(path, IDENTITY, rank=1, ranks=2)
    other.put(record(failed="out of memory"))
    other.close()
    store = Store(path, IDENTITY)
    store.put(record())
    store.reload()
    assert store.last("k") == record()


def test_a_record_whose_tokens_are_gone_is_measured_again(tmp_path: Path) -> None:
    table = pa.table({"nll": [0.5, 1.5]})
    store = Store(tmp_path / "r.jsonl", IDENTITY)
    store.put(record(), table)
    kept = store.get("k")
    assert kept is not None
    assert kept.per_token
    path = tmp_path / "tokens" / "k.parquet"
    assert parquet.read_table(path).equals(table)  # pyright: ignore[reportUnknownMemberType]
    path.unlink()
    assert store.get("k") is None


def test_a_closed_store_holds_no_file_although_something_refers_to_it(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    kept = Store(path, IDENTITY)  # as the traceback of an interrupted sweep keeps it
    kept.put_part(record("a"))
    kept.flush()
    kept.close()
    store = Store(path, IDENTITY)
    store.put_part(record("b"))
    store.flush()
    store.put(record("b"))
    assert [one.key for one in store.parts("a")] == ["a"]


def test_parts_of_another_process_are_dropped_beside_an_own_file_without_a_line(
    tmp_path: Path,
) -> None:
    path = tmp_path / "r.jsonl"
    other = Store(path, IDENTITY, rank=1, ranks=2)
    other.put_part(record("a"))
    other.flush()
    other.close()
    (tmp_path / "r.jsonl.part").write_text('{"longctx"')  # killed within its first line
    store = Store(path, IDENTITY)
    assert store.put(record("a")) == record("a")
    assert not (tmp_path / "r.jsonl.part").exists()
