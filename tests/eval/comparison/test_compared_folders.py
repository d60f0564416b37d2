"""Folders of sweeps side by side: only read, and refused where they are not what they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from longctx.cli.compare import Compare
from longctx.errors import RunError
from longctx.eval import (
    Passkey,
    Perplexity,
    compare,
    sweep,
)
from longctx.eval.reporting.files import write_sweep
from longctx.eval.results.reader import read_sweep

from ..conftest import byte_model, byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real sweep of the tiny model, of two methods."""
    home = tmp_path_factory.mktemp("compare")
    texts = home / "texts"
    texts.mkdir()
    for name in "abc":
        (texts / f"{name}.txt").write_text(f"Line of {name}, one more.\n" * 60)
    text = (str(texts),)
    tasks = [Perplexity(last=64, windows=3, text=text), Passkey(samples=4, text=text)]
    result = sweep(
        byte_model(), byte_tokenizer(), tasks, "500,700", methods=["none", "yarn:2"],
        results=home / "run" / "results.jsonl", progress=False,
    )  # fmt: skip
    write_sweep(result, home / "run")
    return home / "run"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_folder_is_compared_as_its_sweep_was(folder: Path) -> None:
    found = compare({"run": folder})
    report = json.loads((folder / "sweep.json").read_text())
    assert len(found.rows) == len(report["rows"]) == 8
    for row in report["rows"]:
        mine = found.row(row["task"], row["length"], row["method"])
        assert (mine.value, mine.n, mine.failed) == (row["value"], row["n"], None)
    for length in (500, 700):
        cells = [r for r in report["rows"] if (r["task"], r["length"]) == ("perplexity", length)]
        nll = {cell["method"]: cell["nll"] for cell in cells}
        row = found.row("perplexity", length, "yarn:2")
        assert row.difference == pytest.approx(nll["yarn:2"] - nll["none"])
        assert row.paired == 3
    same = compare({"a": f"{folder}#none", "b": f"{folder}#none"})
    assert {row.difference for row in same.rows if row.entry == "b"} == {0.0}
    assert {row.p_value for row in same.rows if row.entry == "b"} == {1.0}


def test_what_the_sweep_noted_is_not_lost(copy: Path) -> None:
    report = json.loads((copy / "sweep.json").read_text())
    report["notes"] = ["3 answers NOT as scored"]
    report["tasks"][-1]["scope"] = {"text": ["another"]}
    (copy / "sweep.json").write_text(json.dumps(report))
    assert "3 answers NOT as scored" in compare({"run": copy}).notes


def test_other_texts_are_said(folder: Path, copy: Path) -> None:
    report = json.loads((copy / "sweep.json").read_text())
    task = next(task for task in report["tasks"] if task["name"] == "perplexity")
    assert {"windows", "text"} <= {*task["scope"]}
    task["scope"]["windows"] = 99
    (copy / "sweep.json").write_text(json.dumps(report))
    found = compare({"a": f"{folder}#none", "b": f"{copy}#none"})
    assert found.notes[0].startswith("perplexity of b and of a is over other windows or texts")


def test_adaptive_sweeps_are_not_tested(folder: Path, copy: Path) -> None:
    report = json.loads((copy / "sweep.json").read_text())
    assert report["adaptive"] is None
    report["adaptive"] = "Adaptive()"
    (copy / "sweep.json").write_text(json.dumps(report))
    with pytest.raises(RunError, match=r"b is of an adaptive sweep.*Sweep both without --adaptive"):
        compare({"a": f"{folder}#none", "b": f"{copy}#none"})


def test_a_folder_is_left_as_it_is(copy: Path) -> None:
    with (copy / "results.jsonl").open("ab") as file:
        file.write(b'{"key": "cut o')
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    found = compare({"run": copy})
    assert any("the last line is cut off (14 bytes) and left out" in n for n in found.notes)
    assert not found.missing
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_cut_line_of_the_report_itself_is_told_of_its_cell(copy: Path) -> None:
    data = (copy / "results.jsonl").read_bytes()
    (copy / "results.jsonl").write_bytes(data[:-20])
    row = compare({"run": copy}).row("passkey", 700, "yarn:2")
    assert row.paired == 0
    assert "holds 0 observations where the report's figure has 4" in str(row.unpaired)


def test_records_that_were_changed_since_are_not_compared(copy: Path) -> None:
    lines = (copy / "results.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    for observation in last["observations"]:
        observation["nll"] += 1
    changed = json.dumps(last)
    with (copy / "results.jsonl").open("a") as file:
        file.write(changed + "\n")
    row = compare({"run": copy}).row("passkey", 700, "yarn:2")
    assert "other observations than the report's figure" in str(row.unpaired)


def test_records_of_other_settings_are_left_out(copy: Path) -> None:
    lines = (copy / "results.jsonl").read_text().splitlines()
    other = {**json.loads(lines[-1]), "key": "of other settings"}
    (copy / "results.jsonl").write_text("\n".join([*lines, json.dumps(other), ""]))
    assert not compare({"run": copy}).missing


def test_the_files_of_further_processes_are_read(copy: Path) -> None:
    header, *lines = (copy / "results.jsonl").read_text().splitlines()
    (copy / "results.jsonl").write_text("\n".join([header, *lines[::2], ""]))
    (copy / "results.1of2.jsonl").write_text("\n".join([header, *lines[1::2], ""]))
    assert not compare({"run": copy}).missing


def test_a_failure_of_another_process_hides_no_success(copy: Path) -> None:
    header, *lines = (copy / "results.jsonl").read_text().splitlines()
    failed = {**json.loads(lines[0]), "observations": [], "failed": "out of memory"}
    (copy / "results.1of2.jsonl").write_text("\n".join([header, json.dumps(failed), ""]))
    assert not compare({"run": copy}).missing
    assert not [record.key for record in read_sweep(copy).records or () if record.failed]


def _no_report(folder: Path) -> None:
    (folder / "sweep.json").unlink()


def _no_results(folder: Path) -> None:
    (folder / "results.jsonl").unlink()


def _bad_report(folder: Path) -> None:
    (folder / "sweep.json").write_text('{"model": "m"}')


def _old_report(folder: Path) -> None:
    report = json.loads((folder / "sweep.json").read_text())
    del report["tasks"][0]["higher_is_better"]
    (folder / "sweep.json").write_text(json.dumps(report))


def _bad_line(folder: Path) -> None:
    path = folder / "results.jsonl"
    header, _, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, "{]", *lines, ""]))


def _bad_header(folder: Path) -> None:
    (folder / "results.jsonl").write_text("{}\n")


def _other_model(folder: Path) -> None:
    path = folder / "results.jsonl"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(header), "model": "x"}), *lines, ""]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no folder .*copy: expected one that `longctx sweep --out` wrote"),
        (_no_report, "holds no sweep.json, which a sweep writes at its end"),
        (_no_results, "holds a report but no results.jsonl"),
        (_bad_report, r"sweep\.json: expected a field"),
        (_old_report, r"sweep.json: tasks\[0\]: .*higher_is_better.*Run the same"),
        (_bad_line, "results.jsonl, line 2: expected JSON"),
        (_bad_header, "results.jsonl, line 1: .* not a results file"),
        (_other_model, r"results.jsonl holds the results of another model \(x, this"),
    ],
)
def test_what_is_no_sweep_is_refused(
    copy: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(copy)
    with pytest.raises(RunError, match=message):
        compare({"run": copy})


def test_an_unknown_method_is_refused(folder: Path) -> None:
    with pytest.raises(RunError, match=r"no method 'yarn:3'; did you mean 'yarn:2'\? \(methods: "):
        compare({"a": folder, "b": f"{folder}#yarn:3"})


def test_a_method_is_found_as_it_was_typed(folder: Path) -> None:
    typed = compare({"a": f"{folder}#none", "b": f"{folder}#yarn:factor=2"})
    labelled = compare({"a": f"{folder}#none", "b": f"{folder}#yarn:2"})
    assert str(typed.rows) == str(labelled.rows)  # as text, since NaN is not itself


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Compare((f"a={folder}#none", f"b={folder}#yarn:2"), out=tmp_path / "out").run() == 0
    assert "b, passkey: " in capsys.readouterr().out
    with pytest.raises(RunError, match="holds a comparison already"):
        Compare((str(folder),), out=tmp_path / "out").run()
    with pytest.raises(RunError, match="two runs are named 'a'"):
        Compare((f"a={folder}", f"a={folder}#none")).run()
    with pytest.raises(RunError, match="two runs are named 'run'"):
        Compare((str(folder), f"{folder}#none")).run()
    with pytest.raises(RunError, match="'a=' names no run"):
        Compare(("a=",)).run()


def test_the_command_exits_1_where_a_cell_failed(copy: Path) -> None:
    report = json.loads((copy / "sweep.json").read_text())
    report["rows"][0] |= {"value": None, "low": None, "high": None, "failed": "out of memory"}
    (copy / "sweep.json").write_text(json.dumps(report))
    assert Compare((str(copy),)).run() == 1
