"""One HTML file that shows what sweeps and decode benches found: no request to anywhere.

Charts and tables are part of the page; its script only adds tooltips and the choice of theme. What
is shown is embedded as JSON too (`<script type="application/json" id="data">`), each run with its
sweep.json as it is, each bench as decodings.json has it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from longctx.errors import RunError
from longctx.files import finite, write_whole
from longctx.folders import refuse_other_than_file

from ..decoding.reader import BENCH_FILE
from ..decoding.result import DecodeBench
from ..results.reader import SWEEP_FILE, SweepData, read_sweep, refuse_other_records
from ..results.verification import notes_of
from . import sections
from .boards import part_boards, reach_board
from .charts import Chart, position_chart, styles, tokens, value_chart
from .decoding_section import decoding_section, read_benches
from .families import MANY, best_of_each, by_family
from .palette import COLOURS, DASHES, HEAT, MARKERS
from .svg import geometry
from .tables import figure, intervals, spread

__all__ = ["refuse_other_content", "render", "write_html"]

_TEMPLATE = "report.html.jinja"
_LIMIT = 6_000_000  # bytes; what a mail or a chat still takes


def write_html(
    runs: Sequence[Path], out: Path, *, plots: bool = False, overwrite: bool = False
) -> list[Path]:
    """Write the report of some folders; returns the files.

    Args:
        runs: folders that `longctx sweep --out` or `longctx decode-bench --out` wrote.
        out: the HTML file.
        plots: write each plot of a sweep beside it, as PNG and SVG.
        overwrite: replace what is there.

    Raises:
        RunError: no run or the same one twice, a folder that cannot be read, a file that is there
            already, or a page above 6 MB.
    """
    if not runs:
        raise RunError(
            "no run to report: name one or more folders of `longctx sweep` or `longctx "
            "decode-bench`."
        )
    refuse_other_than_file(out)
    resolved = [run.resolve() for run in runs]
    for run, place in zip(runs, resolved, strict=True):
        if resolved.count(place) > 1:
            raise RunError(f"{run} is named twice: leave one out.")
    benched = [run for run in runs if (run / BENCH_FILE).exists()]
    swept = [run for run in runs if (run / SWEEP_FILE).exists()]  # a folder may hold both
    for run in runs:
        if run.is_dir() and run not in (*benched, *swept):
            raise RunError(
                f"{run} holds neither {SWEEP_FILE} nor {BENCH_FILE}, which a sweep and a decode "
                "bench write at their end: finish it by the same command, which goes on where it "
                "was, or name another folder."
            )
        if run not in benched and run not in swept:
            raise RunError(
                f"no folder {run}: expected one that `longctx sweep --out` or `longctx "
                "decode-bench --out` wrote."
            )
    sweeps = [read_sweep(run) for run in swept]
    benches = read_benches(benched)
    for sweep in sweeps:
        refuse_other_records(sweep)
    if plots and not sweeps:
        raise RunError(
            "--plots draws what sweeps found, and no sweep is named: leave it out (`longctx "
            "decode-bench` has drawn its own)."
        )
    files: dict[Path, Any] = {}
    text = render(sweeps, benches)
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


def render(sweeps: Sequence[SweepData], benches: Sequence[DecodeBench] = ()) -> str:
    """The whole page as text."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_template),
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    filters: Any = environment.filters  # typed as the ones that jinja2 comes with
    filters.update(figure=figure, spread=spread, tokens=tokens, pretty=_pretty, intervals=intervals)
    filters["families"] = lambda methods: by_family(methods, str)
    filters["map_families"] = lambda maps: by_family(maps, lambda each: each["method"])
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
    return environment.get_template(_TEMPLATE).render(
        title=_title(runs, benches),
        written=decoding_section(benches),
        runs=runs,
        sweeps=shown,
        tasks=tasks,
        values=values,
        lost=lost,
        many=MANY,
        front={
            name: {t: best_of_each(s, t, s.methods) for t in s.tasks} for name, s in shown.items()
        },
        reach={run["name"]: reach_board(shown[run["name"]], run["effective"]) for run in runs},
        parts={name: part_boards(sweep) for name, sweep in shown.items()},
        looks={m: looks[m] for m in dict.fromkeys(m for s in sweeps for m in s.methods)},
        colours=COLOURS,
        heat=HEAT,
        dashes=[dash.svg for dash in DASHES],
        markers=[marker.svg for marker in MARKERS],
        data={
            "longctx": "report",
            "runs": runs,
            "decodings": [finite(dataclasses.asdict(bench)) for bench in benches],
        },
    )


def _template(name: str) -> str:
    return resources.files("longctx.eval.reporting").joinpath(name).read_text(encoding="utf-8")


def _title(runs: Sequence[dict[str, Any]], benches: Sequence[DecodeBench]) -> str:
    said: list[str] = []
    for verb, names in (
        ("read", [run["name"] for run in runs]),
        ("write", [bench.model for bench in benches]),
    ):
        if names:
            s = "s" if len(names) == 1 else ""
            how = "How far" if verb == "read" else "How"
            said.append(f"{how} {', '.join(names)} {verb}{s}")
    return said[0] if len(said) == 1 else f"{said[0]}, and {said[1][0].lower()}{said[1][1:]}"


def _run(sweep: SweepData, name: str) -> dict[str, Any]:
    """What is embedded of a run: its report, and what is derived from its records."""
    pairs = [(task, method) for task in sweep.tasks for method in sweep.methods]
    asked = [pair for pair in pairs if sweep.is_answered(pair[0])]
    found = [sections.depths(sweep, *pair) for pair in asked]
    wrong = [sections.failures(sweep, *pair) for pair in asked]
    return {
        "name": name,
        "report": sweep.source,
        "headline": sections.headline(sweep),
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
