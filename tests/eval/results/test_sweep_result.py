"""Rows, tables, plots and report files of a sweep."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest
import torch
from rich.console import Console

from longctx.errors import RunError
from longctx.eval import Adaptive, Passkey, Perplexity, SweepResult, sweep
from longctx.eval.reporting.files import write_sweep
from longctx.eval.reporting.plots import draw_sweep
from longctx.eval.reporting.tables import intervals, print_sweep
from longctx.eval.results.sweep_result import cell_key

from ..conftest import byte_model, byte_tokenizer
from ..running.test_sweep import Count

METHODS = ("none", "yarn:2", "yarn:4", "ntk:2")


def swept(texts: tuple[str, ...], *, seed: int = 0, methods: Any = METHODS, **how: Any) -> Any:
    tasks = [Count(memory=700), Perplexity(last=64, windows=3, text=texts)]
    return sweep(
        byte_model(seed), byte_tokenizer(), tasks, "300,600,1200", methods=methods, progress=False,
        **how,
    )  # fmt: skip


@pytest.fixture
def result(texts: tuple[str, ...]) -> SweepResult:
    return swept(texts)


def test_a_row_is_found_by_its_cell(result: SweepResult) -> None:
    assert result.row("yarn:4", "perplexity", 600).factor == 4.0
    with pytest.raises(RunError, match=r"measured are the methods none, yarn:2, yarn:4, ntk:2"):
        result.row("yarn:8", "perplexity", 600)


def test_files_hold_the_same_figures(result: SweepResult, tmp_path: Path) -> None:
    paths = write_sweep(result, tmp_path / "out" / "deep")
    assert {path.name for path in paths} == {p.name for p in (tmp_path / "out" / "deep").iterdir()}
    by_name = {path.suffix: path for path in paths}
    report = json.loads(by_name[".json"].read_text(), parse_constant=pytest.fail)
    csv, parquet = pd.read_csv(by_name[".csv"]), pd.read_parquet(by_name[".parquet"])
    assert len(report["rows"]) == len(csv) == len(parquet) == len(result.rows) == 24
    for row, entry, line, stored in zip(
        result.rows, report["rows"], csv.value, parquet.value, strict=True
    ):
        for value in (line, stored, math.nan if entry["value"] is None else entry["value"]):
            assert value == pytest.approx(row.value, rel=1e-15) or (
                math.isnan(value) and row.failed
            )
        assert entry["method"] == row.method
        assert entry["factor"] == row.factor
    assert report["tasks"][1]["estimand"] == result.tasks[1].estimand
    assert report["notes"] == list(result.notes)


def test_the_pictures_are_pictures(result: SweepResult, tmp_path: Path) -> None:
    write_sweep(result, tmp_path)
    pixels = matplotlib.image.imread(tmp_path / "sweep.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 800
    assert "</svg>" in (tmp_path / "sweep.svg").read_text()


def test_the_plot_shows_what_was_measured(result: SweepResult) -> None:
    figure = draw_sweep(result)
    count, perplexity = figure.axes
    assert [line.get_label() for line in perplexity.lines[:4]] == list(METHODS)
    drawn = perplexity.lines[2]
    rows = [result.row("yarn:4", "perplexity", n) for n in result.lengths]
    assert list(drawn.get_xdata()) == list(result.lengths)  # pyright: ignore[reportArgumentType]
    assert list(drawn.get_ydata()) == [row.value for row in rows]  # pyright: ignore[reportArgumentType]
    assert list(count.lines[0].get_xdata()) == [300, 600], "what failed is not drawn"  # pyright: ignore[reportArgumentType]
    for axes in (count, perplexity):
        assert axes.lines[-1].get_xdata()[0] == 512, "the original window"  # pyright: ignore[reportIndexIssue]
        assert [t.get_text() for t in axes.get_xticklabels()] == ["300", "600", "1200"]
    yarns = perplexity.lines[1], perplexity.lines[2]
    assert len({line.get_color() for line in yarns}) == 1
    assert len({line.get_linestyle() for line in yarns}) == 2
    assert len({line.get_color() for line in perplexity.lines[:4]}) == 3


def test_intervals_that_differ_are_told_with_their_place(result: SweepResult) -> None:
    rows = [row for row in result.rows if row.task == "perplexity"]
    own = [dataclasses.replace(row, interval="A" if row.length == 300 else "B") for row in rows]
    assert intervals(own) == ["interval (at 300): A", "interval (at 600, 1,200): B"]
    own[0] = dataclasses.replace(own[0], interval="B")  # none at 300
    first = "yarn:2 at 300; yarn:4 at 300; ntk:2 at 300"
    assert "none at 300, 600, 1,200; yarn:2 at 600, 1,200" in intervals(own)[0]
    assert intervals(own)[1] == f"interval ({first}): A"


def test_the_table_says_what_it_shows(result: SweepResult) -> None:
    out = io.StringIO()
    print_sweep(result, Console(file=out, width=300))
    text = out.getvalue()
    row = result.row("ntk:2", "perplexity", 300)
    assert f"{row.value:.0f}" in text
    assert math.isnan(row.low)
    assert "0–200" in text
    assert "* beyond the window that the model claims" in text
    assert "failed" in text
    assert "none at 1,200: out of memory at 1200 tokens" in text
    assert result.tasks[1].estimand in text
    assert "a note" in text
    assert "interval: made up" in text
    assert text.count("interval: none: two documents, and an interval takes three") == 1


def test_a_larger_report_takes_the_place_of_a_smaller_one(
    texts: tuple[str, ...], tmp_path: Path
) -> None:
    small, large = swept(texts, methods=["none"]), swept(texts)
    write_sweep(small, tmp_path)
    write_sweep(large, tmp_path)
    with pytest.raises(RunError, match=r"holds a report with 18 cells that this sweep lacks"):
        write_sweep(small, tmp_path)
    assert len(pd.read_csv(tmp_path / "sweep.csv")) == 24
    with pytest.raises(RunError, match="18 cells that this sweep lacks"):  # before any work
        swept(texts, methods=["none"], results=tmp_path / "results.jsonl")
    swept(texts, methods=["none"], results=tmp_path / "results.jsonl", overwrite=True)
    write_sweep(small, tmp_path, overwrite=True)
    assert len(pd.read_csv(tmp_path / "sweep.csv")) == 6


def test_another_model_report_is_refused(
    result: SweepResult, texts: tuple[str, ...], tmp_path: Path
) -> None:
    write_sweep(result, tmp_path)
    with pytest.raises(RunError, match="holds the report of another model: name another folder"):
        write_sweep(swept(texts, seed=1), tmp_path)
    with pytest.raises(RunError, match="report of another model"):  # and before any work
        swept(texts, seed=1, results=tmp_path / "results.jsonl")
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(RunError, match=r"sweep.json: expected JSON, .* Name another folder"):
        write_sweep(result, tmp_path)


def test_a_sweep_without_any_figure_is_written(texts: tuple[str, ...], tmp_path: Path) -> None:
    model = byte_model()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    task = Perplexity(last=64, windows=3, text=texts)
    result = sweep(model, byte_tokenizer(), [task], "300,600", progress=False)
    assert len(write_sweep(result, tmp_path)) == 5


def test_figures_are_there_whatever_becomes_of_the_plot(
    result: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("longctx.eval.reporting.plots.draw_sweep", broken)
    with pytest.raises(ValueError, match="a bug"):
        write_sweep(result, tmp_path)
    assert {p.suffix for p in tmp_path.glob("sweep.*")} == {".csv", ".parquet", ".json"}


def test_a_folder_that_cannot_be_written_is_said(result: SweepResult, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        write_sweep(result, tmp_path / "file")


def test_a_full_disk_leaves_no_half_report_and_keeps_the_results(
    texts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = swept(texts, results=tmp_path / "results.jsonl")

    def full(*args: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(RunError, match=r"No space left.*results.jsonl, not lost"):
        write_sweep(result, tmp_path)
    left = sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".")
    assert left == ["results.jsonl", "sweep.csv", "texts", "tokens"]
    monkeypatch.undo()
    write_sweep(result, tmp_path)


def test_other_windows_or_an_adaptive_sweep_are_other_cells() -> None:
    def key(task: Perplexity | Passkey, adaptive: Adaptive | None = None) -> str:
        return cell_key("none", task, 512, adaptive)

    assert key(Perplexity()) == key(Perplexity())
    assert key(Perplexity(windows=2)) != key(Perplexity(windows=3))
    assert Perplexity(windows=2).cache_key() == Perplexity(windows=3).cache_key(), (
        "windows are reused"
    )
    assert key(Passkey(), Adaptive()) != key(Passkey())


def test_why_there_is_no_interval_is_said(texts: tuple[str, ...]) -> None:
    task = Perplexity(last=32, windows=1, text=texts)
    result = sweep(byte_model(), byte_tokenizer(), [task], (200,), progress=False)
    console = Console(width=100, record=True, file=io.StringIO())
    print_sweep(result, console)
    assert "none: one document" in console.export_text()
