from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from longctx.cli.report import Report
from longctx.errors import RunError
from longctx.eval.reporting.html import write_html
from longctx.eval.results.reader import read_sweep
from longctx.eval.stats.intervals import wilson

from ..runs import NASTY, WINDOW, write_run


class _Page(HTMLParser):
    """Every tag with its attributes, and the embedded JSON."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.embedded = ""
        self.text = path.read_text(encoding="utf-8")
        self._inside = False
        self.feed(self.text)
        self.data: dict[str, Any] = json.loads(self.embedded)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.embedded += data

    def having(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in attributes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "run"
    write_run(folder, failed=1024)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> _Page:
    (path,) = write_html([folder], folder.parent / "report.html")
    return _Page(path)


def test_the_embedded_report_is_sweep_json(folder: Path, page: _Page) -> None:
    (run,) = page.data["runs"]
    assert run["report"] == json.loads((folder / "sweep.json").read_text())


def test_the_tables_show_the_rows(page: _Page) -> None:
    rows = page.data["runs"][0]["report"]["rows"]
    wanted = {(r["value"], r["low"], r["high"], r["n"]) for r in rows}
    shown = page.having("data-value")
    assert len(shown) == len(rows)

    def number(text: str | None) -> float | None:
        found = float(str(text))
        return None if math.isnan(found) else found

    found = {
        (
            *(number(cell[f"data-{name}"]) for name in ("value", "low", "high")),
            number(cell["data-n"]),
        )
        for cell in shown
    }
    assert found == wanted


def test_depths_add_up_to_the_rows_with_wilson_intervals(page: _Page) -> None:
    (run,) = page.data["runs"]
    rows = {(r["method"], r["length"]): r for r in run["report"]["rows"] if r["task"] == "passkey"}
    assert len(run["depths"]) == 2
    for found in run["depths"]:
        assert found["depths"] == ["0%", "25%", "50%", "75%", "100%"]
        for place, length in enumerate(found["lengths"]):
            cells = [row[place] for row in found["cells"]]
            row = rows[found["method"], length]
            if row["failed"]:
                assert cells == [None] * 5
                continue
            assert sum(cell["n"] for cell in cells) == row["n"]
            assert sum(cell["hits"] for cell in cells) == pytest.approx(row["value"] * row["n"])
            for cell in cells:
                low, high = wilson(cell["hits"], cell["n"])
                assert (cell["low"], cell["high"]) == (round(low, 4), round(high, 4))
    assert all("–" in str(cell["data-spread"]) for cell in page.having("data-hits"))


def test_random_depths_are_gathered_into_tenths(tmp_path: Path) -> None:
    write_run(tmp_path / "run", random_depths=True, samples=40)
    (path,) = write_html([tmp_path / "run"], tmp_path / "report.html")
    found = _Page(path).data["runs"][0]["depths"][0]
    assert found["depths"][0] == "0%–10%"
    assert len(found["depths"]) == 10


def test_loss_by_position_covers_every_token_once(page: _Page) -> None:
    found = page.data["runs"][0]["positions"]
    assert found["window"] == WINDOW
    for line in found["lines"]:
        bins = line["bins"]
        assert sum(each["tokens"] for each in bins) == 3 * 1023
        assert bins[0]["first"] == 1
        assert bins[-1]["last"] == 1023
        assert all(a["last"] + 1 == b["first"] for a, b in pairwise(bins))
        assert bins[-1]["nll"] > bins[3]["nll"] + 1  # as the tokens were made


def test_repetition_shows_whatever_numbers_there_are(page: _Page) -> None:
    found = page.data["runs"][0]["repetition"]
    assert found["metrics"] == ["seq_rep_4", "loop_onset"]
    assert found["rows"][0]["values"]["loop_onset"] == [7.0, 2]


def test_cost_is_the_sum_of_the_rows(page: _Page) -> None:
    (run,) = page.data["runs"]
    rows = run["report"]["rows"]
    for cost in run["cost"]:
        own = [r for r in rows if (r["method"], r["task"]) == (cost["method"], cost["task"])]
        assert cost["tokens"] == sum(r["tokens"] for r in own)
        assert cost["seconds"] == pytest.approx(sum(r["seconds"] for r in own))
    assert page.data["runs"][0]["cost"][0]["how"] == ["whole prompts"]


def test_no_string_of_a_run_becomes_html(page: _Page) -> None:
    assert NASTY not in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert [tag for tag, _ in page.tags].count("script") == 2
    examples = page.data["runs"][0]["failures"][0]["examples"]
    assert examples[0]["said"].startswith(f"{NASTY}\\n")  # the line end is written out


def test_nothing_points_outside_the_file(page: _Page) -> None:
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,"
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|https?://", page.text)
    assert len(page.text) < 6_000_000


def test_what_a_figure_is_stands_in_the_report(folder: Path, tmp_path: Path) -> None:
    sweep = read_sweep(folder)
    assert [sweep.is_share(task) for task in sweep.tasks] == [True, False, True]
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "sweep.json"
    report = json.loads(path.read_text())
    for row in report["rows"]:
        if row["task"] == "perplexity":
            row["value"] = 0.9  # below 1, yet no share
    path.write_text(json.dumps(report))
    assert not read_sweep(tmp_path / "run").is_share("perplexity")
    del report["tasks"][2]["scale"]
    path.write_text(json.dumps(report))
    with pytest.raises(RunError, match=r"tasks\[2\]: .*scale.* Run the same"):
        read_sweep(tmp_path / "run")


def test_two_runs_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other", methods=("none",), lengths=(256, 512))
    (path,) = write_html([folder, tmp_path / "other"], tmp_path / "report.html")
    names = [run["name"] for run in _Page(path).data["runs"]]
    assert names == ["tiny (run)", "tiny (other)"]


def test_without_records_the_figures_are_shown_and_the_lack_is_told(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "results.jsonl").unlink()
    (path,) = write_html([tmp_path / "run"], tmp_path / "report.html")
    page = _Page(path)
    assert len(page.having("data-value")) == 18
    assert "holds no results.jsonl" in page.data["runs"][0]["missing"][0]


def test_missing_token_scores_are_told(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    next((tmp_path / "run" / "tokens").iterdir()).unlink()
    (path,) = write_html([tmp_path / "run"], tmp_path / "report.html")
    (run,) = _Page(path).data["runs"]
    assert run["positions"] is None
    assert "1 files of token scores are missing" in run["missing"][0]


def test_plots_lie_beside_the_page(folder: Path, tmp_path: Path) -> None:
    report = Report((folder,), out=tmp_path / "r.html", plots=True)
    assert report.run() == 0
    names = {path.name for path in tmp_path.iterdir()}
    plots = ("passkey", "passkey-depth", "perplexity", "repetition", "position")
    assert names == {"r.html", *(f"r-tiny-{p}.{kind}" for p in plots for kind in ("png", "svg"))}


def test_bad_input_is_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(RunError, match=r"holds neither sweep\.json nor decodings\.json"):
        write_html([tmp_path], out)
    with pytest.raises(RunError, match="no run to report"):
        write_html([], out)
    with pytest.raises(RunError, match="named twice"):
        write_html([folder, folder], out)
    with pytest.raises(RunError, match=r"is a folder, which .* expected a file"):
        write_html([folder], tmp_path)
    out.write_text("mine")
    with pytest.raises(RunError, match="exists: name another --out, or pass --overwrite"):
        write_html([folder], out)
    assert out.read_text() == "mine"
    write_html([folder], out, overwrite=True)
    assert out.read_text() != "mine"


def test_damaged_folders_are_told(tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "report.html"
    write_run(folder)
    report, results = folder / "sweep.json", folder / "results.jsonl"
    whole, lines = report.read_text(), results.read_text().splitlines(keepends=True)

    report.write_text(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"sweep\.json: expected JSON, .*sweep` again"):
        write_html([folder], out)
    report.write_text(whole)

    results.write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(RunError, match=r"holds 0 observations .*passkey under none at 256 tok"):
        write_html([folder], out)

    results.write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]))
    with pytest.raises(RunError, match="line 2: expected JSON"):
        write_html([folder], out)

    results.write_text(lines[0].replace("0123456789abcdef", "another") + "".join(lines[1:]))
    with pytest.raises(RunError, match="results of another model"):
        write_html([folder], out)

    changed = lines[1].replace('"nll": 0.', '"nll": 9.')
    results.write_text("".join([lines[0], changed, *lines[2:]]))
    with pytest.raises(RunError, match=r"holds other observations than .*: run the same"):
        write_html([folder], out)
    results.write_text("".join(lines))

    next((folder / "tokens").iterdir()).write_bytes(b"cut")
    with pytest.raises(RunError, match="holds no scores of single tokens"):
        write_html([folder], out)


def test_the_first_sentence_says_how_far_the_best_method_reads(tmp_path: Path) -> None:
    from longctx.eval.reporting.sections import headline
    from longctx.eval.results.reader import read_sweep

    write_run(tmp_path / "run")
    sweep = read_sweep(tmp_path / "run")
    found = headline(sweep)
    assert found is not None
    assert found["task"] == "passkey"
    reached = {m: {r.length: r.value for r in sweep.cells("passkey", m)} for m in sweep.methods}
    long_enough = {
        m: [n for n in v if all(v[k] >= 0.8 for k in v if k <= n)] for m, v in reached.items()
    }
    furthest = max((max(n, default=0) for n in long_enough.values()), default=0)
    said = f"tiny reads to {furthest:,} tokens" if furthest else "tiny finds less than 80%"
    assert found["text"].startswith(said)
