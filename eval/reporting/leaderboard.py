"""Many models and methods on one page: a table for each task, to be sorted and filtered.

A row is a method on a model, from one folder of a sweep. Rows stand in one table only if the task
had the same settings; tokenizers may differ, and then the prompts do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from longctx.errors import RunError
from longctx.files import write_whole
from longctx.fingerprint import json_digest
from longctx.folders import refuse_other_than_file

from ..results.reader import SweepData, read_sweep
from ..results.sweep_result import Row
from ..stats.intervals import wilson
from .families import reads_to
from .html import refuse_other_content
from .tables import figure, spread

__all__ = ["folders_of", "write_leaderboard"]


@dataclass(frozen=True, slots=True)
class _Cell:
    """A figure of the table."""

    text: str
    interval: str
    sort: float
    """What its column is sorted by; NaN stands last."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A method on a model."""

    model: str
    method: str
    run: str
    window: _Cell
    claims: _Cell
    reads: _Cell
    far: _Cell
    cells: tuple[_Cell, ...]


@dataclass(frozen=True, slots=True)
class _Standing:
    """A model as it came, and under the method that makes it read furthest."""

    model: str
    window: str
    came: _Entry | None
    best: _Entry


@dataclass(frozen=True, slots=True)
class _Board:
    """The table of a task at one setting."""

    task: str
    estimand: str
    lengths: tuple[int, ...]
    answered: bool
    higher_is_better: bool
    prompts: int
    """Of a cell at most."""
    entries: tuple[_Entry, ...]


def folders_of(paths: Sequence[Path]) -> list[Path]:
    """The folders of sweeps that are named, or that lie in those that are named.

    Raises:
        RunError: a path that is not a folder, or one without a sweep in it.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise RunError(f"{path} is not a folder: name folders of `longctx sweep`.")
        inside = sorted(report.parent for report in path.rglob("sweep.json") if report.is_file())
        if not inside:
            raise RunError(f"{path} holds no sweep.json: name folders of `longctx sweep`.")
        found += inside
    return list(dict.fromkeys(found))


def write_leaderboard(runs: Sequence[Path], out: Path, *, overwrite: bool = False) -> Path:
    """Write the page.

    Args:
        runs: folders that `longctx sweep --out` wrote.
        out: the HTML file.
        overwrite: replace what is there.

    Raises:
        RunError: a folder that cannot be read as a sweep's, or a file that is there already.
    """
    refuse_other_than_file(out)
    if out.exists() and not overwrite:
        raise RunError(f"{out} exists: name another --out, or pass --overwrite.")
    refuse_other_content(out)
    text = render(_boards([(run.name, read_sweep(run)) for run in runs]), len(runs))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(out, lambda part: part.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot write {out}: {error}. Name another --out.") from error


def render(boards: Sequence[_Board], runs: int) -> str:
    """The whole page as text."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("longctx.eval.reporting").joinpath("leaderboard.html.jinja")
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        boards=boards, runs=runs, standings=_standings(boards)
    )


def _standings(boards: Sequence[_Board]) -> list[_Standing]:
    """The models of the table of answers with most prompts, those that read furthest first."""
    answered = [board for board in boards if board.answered]
    entries = max(answered, key=lambda board: board.prompts).entries if answered else ()
    found: list[_Standing] = []
    for model in dict.fromkeys(entry.model for entry in entries):
        own = [entry for entry in entries if entry.model == model]
        came = next((entry for entry in own if entry.method == "none"), None)
        best = max(own, key=_rank)
        found.append(_Standing(model, best.window.text, came, best))
    return sorted(found, key=lambda one: _rank(one.best), reverse=True)


def _rank(entry: _Entry) -> tuple[float, ...]:
    figures = (entry.reads, entry.far, *reversed(entry.cells))
    return tuple(-1.0 if math.isnan(cell.sort) else cell.sort for cell in figures)


def _boards(sweeps: Sequence[tuple[str, SweepData]]) -> list[_Board]:
    """A table for each task and setting, in the order in which they come.

    Perplexities by tokens of another kind are not to be ranked: they have a table each.
    """
    groups: dict[tuple[str, str, str], list[tuple[str, SweepData]]] = {}
    for run, sweep in sweeps:
        for task, settings in sweep.tasks.items():
            tokenizer = "" if sweep.is_share(task) else sweep.identity["tokenizer"]
            key = (task, json_digest(settings.report_identity), tokenizer)
            groups.setdefault(key, []).append((run, sweep))
    return [_board(task, group) for (task, *_), group in groups.items()]


def _board(task: str, group: Sequence[tuple[str, SweepData]]) -> _Board:
    first = group[0][1]
    lengths = tuple(sorted({length for _, sweep in group for length in sweep.lengths}))
    entries = [
        _entry(run, sweep, task, method, lengths)
        for run, sweep in group
        for method in sweep.methods
        if sweep.cells(task, method)
    ]
    better = -1 if first.is_higher_better(task) else 1
    entries.sort(key=lambda one: [_last(better * cell.sort) for cell in reversed(one.cells)])
    return _Board(
        task=task,
        estimand=first.tasks[task].estimand,
        lengths=lengths,
        answered=any(sweep.is_answered(task) for _, sweep in group),
        higher_is_better=first.is_higher_better(task),
        prompts=max(
            (row.n for _, sweep in group for row in sweep.rows if row.task == task), default=0
        ),
        entries=tuple(entries),
    )


def _entry(run: str, sweep: SweepData, task: str, method: str, lengths: Sequence[int]) -> _Entry:
    rows = {row.length: row for row in sweep.cells(task, method)}
    share = sweep.is_share(task)
    some = next(iter(rows.values()))
    return _Entry(
        model=sweep.model,
        method=method,
        run=run,
        window=_tokens(sweep.original_window),
        claims=_tokens(some.window),
        reads=_reads(sweep, task, method) if sweep.is_answered(task) else _nothing(),
        far=_far(list(rows.values())),
        cells=tuple(_figure(rows.get(length), share=share) for length in lengths),
    )


def _nothing() -> _Cell:
    return _Cell("–", "", math.nan)


def _tokens(count: int | None) -> _Cell:
    return _nothing() if count is None else _Cell(f"{count:,}", "", count)


def _figure(row: Row | None, *, share: bool) -> _Cell:
    if row is None or math.isnan(row.value):
        return _nothing()
    return _Cell(figure(row, share=share), spread(row, share=share), row.value)


def _reads(sweep: SweepData, task: str, method: str) -> _Cell:
    """The longest length up to which at least 80% are found at every tested one."""
    known = [row.length for row in sweep.cells(task, method) if not math.isnan(row.value)]
    reached = reads_to(sweep, task, method)
    if reached is None:
        return _Cell(f"< {min(known):,}", "", 0) if known else _nothing()
    sign = "≥ " if reached == max(known) else ""
    return _Cell(f"{sign}{reached:,}", "", reached)


def _far(rows: Sequence[Row]) -> _Cell:
    """Keys found that stand further back than the original window."""
    far, found = (sum(getattr(row, name) or 0 for row in rows) for name in ("far", "far_found"))
    if not far:
        return _nothing()
    low, high = wilson(found, far)
    return _Cell(f"{found} of {far}", f"{100 * low:.0f}–{100 * high:.0f}%", found / far)


def _last(value: float) -> float:
    return math.inf if math.isnan(value) else value
