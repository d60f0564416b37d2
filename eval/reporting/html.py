"""One HTML file that shows what sweeps found: no request to anywhere, to be handed around.

Charts and tables are part of the page; its script only adds tooltips and the choice of theme. What
is shown is embedded as JSON too (`<script type="application/json" id="data">`), each run with its
sweep.json as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from longctx.errors import RunError
from longctx.files import write_whole
from longctx.folders import refuse_other_than_file

from ..results.reader import SweepData, read_sweep, refuse_other_records
from ..results.verification import notes_of
from . import sections
from .charts import Chart, position_chart, styles, tokens, value_chart
from .palette import COLOURS, DASHES, HEAT, MARKERS
from .svg import geometry
from .tables import figure, intervals, spread

__all__ = ["refuse_other_content", "render", "write_html"]

_TEMPLATE = "report.html.jinja"
_LIMIT = 6_000_000  # bytes; what a mail or a chat still takes


def write_html(
    runs: Sequence[Path], out: Path, *, plots: bool = False, overwrite: bool = False
) -> list[Path]:
    """Write the report of some sweep folders; returns the files.

    Args:
        runs: folders that `longctx sweep --out` wrote.
        out: the HTML file.
        plots: write each plot beside it, as PNG and SVG.
        overwrite: replace what is there.

    Raises:
        RunError: no run or the same one twice, a folder that cannot be read as a sweep's, a file
            that is there already, or a page above 6 MB.
    """
    if not runs:
        raise RunError("no run to report: name one or more folders of `longctx sweep`.")
    refuse_other_than_file(out)
    resolved = [run.resolve() for run in runs]
    for run, place in zip(runs, resolved, strict=True):
        if resolved.count(place) > 1:
            raise RunError(f"{run} is named twice: leave one out.")
    sweeps = [read_sweep(run) for run in runs]
    for sweep in sweeps:
        refuse_other_records(sweep)
    files: dict[Path, Any] = {}
    text = render(sweeps)
    if len(text.encode()) > _LIMIT:
        raise RunError(
            f"the report of {len(runs)} runs takes {len(text.encode()):,} bytes, more than the "
            f"{_LIMIT:,} that can be handed around: report fewer runs at a time."
        )
    files[out] = text.encode()
    if plots:
        from .plots import report_plots

        files |= report_plots(sweeps, _names(sweeps), out)
    for path in files:
        refuse_other_than_file(path)
        if path.exists() and not overwrite:
            raise RunError(f"{path} exists: name another --out, or pass --overwrite.")
        refuse_other_content(path)
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda part, content=content: part.write_bytes(content))
    except OSError as error:
        raise RunError(f"cannot write {out}: {error}. Name another --out.") from error
    return list(files)


def refuse_other_content(path: Path) -> None:
    """Refuse to replace what is neither page nor plot: a run's own results, say."""
    if path.suffix in (".html", ".htm", ".png", ".svg") or not path.exists():
        return
    start = b"<!doctype html"
    try:
        with path.open("rb") as file:
            there = file.read(len(start))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error}. Name another --out.") from error
    if there and there.lower() != start:
        raise RunError(f"{path} is not an HTML page: name another --out, such as report.html.")


def render(sweeps: Sequence[SweepData]) -> str:
    """The whole page as text."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    filters: Any = environment.filters  # typed as the ones that jinja2 comes with
    filters.update(figure=figure, spread=spread, tokens=tokens, pretty=_pretty, intervals=intervals)
    source = (
        resources.files("longctx.eval.reporting").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    )
    names = _names(sweeps)
    looks = styles([method for sweep in sweeps for method in sweep.methods])
    runs = [_run(sweep, name) for sweep, name in zip(sweeps, names, strict=True)]
    tasks = list(dict.fromkeys(task for sweep in sweeps for task in sweep.tasks))
    values = {
        task: _charts(
            {r["name"]: value_chart(s, task, looks) for r, s in _having(runs, sweeps, task)}
        )
        for task in tasks
    }
    lost = _charts(
        {
            run["name"]: position_chart(sweep, run["positions"], looks)
            for run, sweep in zip(runs, sweeps, strict=True)
            if run["positions"] is not None
        }
    )
    shown = {run["name"]: sweep for run, sweep in zip(runs, sweeps, strict=True)}
    return environment.from_string(source).render(
        runs=runs,
        sweeps=shown,
        tasks=tasks,
        values=values,
        lost=lost,
        looks={m: looks[m] for m in dict.fromkeys(m for s in sweeps for m in s.methods)},
        colours=COLOURS,
        heat=HEAT,
        dashes=[dash.svg for dash in DASHES],
        markers=[marker.svg for marker in MARKERS],
        data={"longctx": "report", "runs": runs},
    )


def _run(sweep: SweepData, name: str) -> dict[str, Any]:
    """What is embedded of a run: its report, and what is derived from its records."""
    pairs = [(task, method) for task in sweep.tasks for method in sweep.methods]
    asked = [pair for pair in pairs if sweep.is_answered(pair[0])]
    found = [sections.depths(sweep, *pair) for pair in asked]
    wrong = [sections.failures(sweep, *pair) for pair in asked]
    return {
        "name": name,
        "report": sweep.source,
        "effective": [sections.effective(sweep, *pair) for pair in asked],
        "depths": [each for each in found if each is not None],
        "positions": sections.positions(sweep),
        "repetition": sections.repetition(sweep),
        "failures": [each for each in wrong if each is not None],
        "cost": [sections.cost(sweep, *pair) for pair in pairs],
        "missing": _missing(sweep),
        "notes": _notes(sweep),
    }


def _notes(sweep: SweepData) -> list[str]:
    """What the sweep noted, without what the page shows of answers that were generated too."""
    shown = notes_of(sweep.verified)
    return [note for note in sweep.notes if note not in shown]


def _missing(sweep: SweepData) -> list[str]:
    """What could not be read, and what is missing from the page for it."""
    notes, folder = list(sweep.reading_notes), sweep.folder
    if folder is not None and sweep.records is None:
        notes.append(
            f"{folder.name} holds no results.jsonl: depths, failed answers, repetition and how "
            "prompts were run are not known"
        )
    if folder is not None and (missing := sweep.missing_tokens()):
        notes.append(
            f"{missing} files of token scores are missing from {folder.name}/tokens: loss by "
            "position is left out"
        )
    return notes


def _having(
    runs: Sequence[dict[str, Any]], sweeps: Sequence[SweepData], task: str
) -> list[tuple[dict[str, Any], SweepData]]:
    return [(r, s) for r, s in zip(runs, sweeps, strict=True) if task in s.tasks]


def _charts(charts: dict[str, Chart]) -> dict[str, dict[str, Any]]:
    """Each with its geometry, on common axes."""
    among = list(charts.values())
    return {name: geometry(chart, among) for name, chart in charts.items()}


def _names(sweeps: Sequence[SweepData]) -> list[str]:
    """The models, with the folder where two sweeps are of one that is called the same."""
    models = [sweep.model for sweep in sweeps]
    names = [
        s.model
        if models.count(s.model) == 1 or s.folder is None
        else f"{s.model} ({s.folder.resolve().name})"
        for s in sweeps
    ]
    return [
        name if names.count(name) == 1 else f"{name} #{number}"
        for number, name in enumerate(names, 1)
    ]


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)
