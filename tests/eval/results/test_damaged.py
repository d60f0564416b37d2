"""Damaged files give an error that names file and key, never a traceback; whole ones are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from longctx.errors import LongctxError, RunError
from longctx.eval import compare, lm_eval
from longctx.eval.reporting.html import write_html
from longctx.eval.results.store import Store
from longctx.eval.tasks.shared.protocol import Observation

from ..runs import IDENTITY, write_run

GONE: Any = object()
HUGE = 10**30


def spoilt(value: Any, place: str, wrong: Any) -> Any:
    """The same with another value (GONE: none) at a place such as "rows.0.length"."""
    if not place:
        return wrong
    key, _, rest = place.partition(".")
    whole: Any = list(value) if isinstance(value, list) else dict(value)
    index: Any = int(key) if isinstance(whole, list) else key
    if rest or wrong is not GONE:
        whole[index] = spoilt(whole[index] if rest else None, rest, wrong)
    else:
        del whole[index]
    return whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "run"
    write_run(folder, lengths=(256, 512), samples=5)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def refused(folder: Path, *names: str) -> None:
    """Report and comparison refuse a folder, and say which file and key is at fault."""
    for use in (
        lambda: write_html([folder], folder / "report.html", plots=True, overwrite=True),
        lambda: compare({"run": folder}),
    ):
        with pytest.raises(RunError) as found:
            use()
        assert all(name in str(found.value) for name in names), found.value


def test_a_whole_folder_is_read(folder: Path) -> None:
    write_html([folder], folder / "report.html")
    compare({"run": folder})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "NaN", "[" * 10**5, "9" * 5000])
@pytest.mark.parametrize("name", ["sweep.json", "results.jsonl"])
def test_what_is_not_a_record_is_refused(folder: Path, name: str, text: str) -> None:
    path = folder / name
    if name == "sweep.json":
        path.write_text(text)
    else:
        header, _, *lines = path.read_text().splitlines()
        path.write_text("\n".join([header, text, *lines, ""]))
    refused(folder, name, "expected")
    path.write_bytes(b"\xff\xfe\n\n")
    refused(folder, name)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("model", GONE),
        ("model", 3),
        ("identity", []),
        ("identity", {}),
        ("identity.tokenizer", None),
        ("original_window", -512),
        ("original_window", "512"),
        ("lengths", []),
        ("lengths", 256),
        ("lengths.0", 0),
        ("lengths.1", HUGE),
        ("methods", {}),
        ("methods.0.label", None),
        ("methods.1", "yarn:4"),
        ("tasks.0.scale", "points"),
        ("tasks.0.spec", []),
        ("tasks.1.higher_is_better", 1),
        ("tasks", {"passkey": {}}),
        ("rows", None),
        ("rows.0", []),
        ("rows.0.value", "85%"),
        ("rows.0.value", -0.5),
        ("rows.0.value", 1e999),
        ("rows.1.n", -1),
        ("rows.1.n", 2.5),
        ("rows.2.length", HUGE),
        ("rows.3.nll", [1.0]),
        ("rows.3.nll", float("nan")),
        ("rows.0.window", True),
        ("rows.0.failed", 7),
        ("notes", "one"),
        ("adaptive", {}),
        ("verified", [{}]),
        ("verified.0.checked", -1),
        ("records", [1]),
        ("cells", None),
    ],
)
def test_a_damaged_report_is_refused(folder: Path, place: str, wrong: Any) -> None:
    path = folder / "sweep.json"
    path.write_text(json.dumps(spoilt(json.loads(path.read_text()), place, wrong)))
    refused(folder, "sweep.json: ", "un the same `longctx sweep` again")


RECORD = [
    ("key", GONE),
    ("key", 5),
    ("key", ""),
    ("key", "k" * 5000),
    ("method", None),
    ("lengths", []),
    ("lengths", 256),
    ("lengths.0", -256),
    ("tokens", -1),
    ("tokens", HUGE),
    ("seconds", -1.5),
    ("seconds", float("inf")),
    ("how", []),
    ("observations", {}),
    ("observations.0", []),
    ("observations.0.length", "256"),
    ("observations.0.length", 0),
    ("observations.0.nll", "low"),
    ("observations.0.nll", float("nan")),
    ("observations.0.nll", 1e999),
    ("observations.0.targets", -5),
    ("observations.0.correct", 1),
    ("observations.0.detail", []),
    ("observations.0.detail.wanted_depth", "deep"),
    ("observations.0.detail.wanted_depth", None),
    ("observations.0.detail.depth", 7),
    ("failed", True),
    ("per_token", "yes"),
    ("more", 1),
]


@pytest.mark.parametrize(("place", "wrong"), RECORD)
def test_a_damaged_result_is_refused(folder: Path, place: str, wrong: Any) -> None:
    path = folder / "results.jsonl"
    header, first, *lines = path.read_text().splitlines()
    bad = json.dumps(spoilt(json.loads(first), place, wrong))
    path.write_text("\n".join([header, bad, *lines, ""]))
    refused(folder, "results.jsonl, line 2: ", "Delete that line")
    with pytest.raises(RunError, match="line 2: "):
        Store(path, IDENTITY)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [("", []), ("", 1), ("longctx", "other"), ("longctx", GONE), ("version", 1), ("version", 2.5),
     ("version", "2"), ("version", HUGE), ("model", None), ("model", ["0123456789abcdef"]),
     ("tokenizer", 7), ("tokenizer", GONE)],
)  # fmt: skip
def test_a_damaged_header_is_refused(folder: Path, place: str, wrong: Any) -> None:
    path = folder / "results.jsonl"
    header, *lines = path.read_text().splitlines()
    bad = json.dumps(spoilt(json.loads(header), place, wrong))
    path.write_text("\n".join([bad, *lines, ""]))
    refused(folder, "results.jsonl")
    with pytest.raises(RunError, match="name another"):
        Store(path, IDENTITY)


def test_an_answer_that_is_missing_is_not_taken_for_a_wrong_one(folder: Path) -> None:
    path = folder / "results.jsonl"
    header, first, *lines = path.read_text().splitlines()
    bad = json.dumps(spoilt(json.loads(first), "observations.0.correct", None))
    path.write_text("\n".join([header, bad, *lines, ""]))
    with pytest.raises(RunError, match="other observations"):
        write_html([folder], folder / "report.html")


@pytest.mark.parametrize("column", ["method", "document", "length", "context", "nll"])
def test_damaged_token_scores_are_refused(folder: Path, column: str) -> None:
    import pandas as pd

    path = next((folder / "tokens").iterdir())
    frame = pd.read_parquet(path)
    for spoil in (frame.drop(columns=column), frame.head(0)):
        spoil.to_parquet(path)
        with pytest.raises(RunError, match="holds no scores of single tokens"):
            write_html([folder], folder / "report.html")
    if column in ("length", "context", "nll"):
        frame.assign(**{column: "x"}).to_parquet(path)
        with pytest.raises(RunError, match="holds no scores of single tokens"):
            write_html([folder], folder / "report.html")


SCORE: dict[str, Any] = {
    "method": "none",
    "task": "words",
    "length": 600,
    "metric": "acc",
    "value": 0.5,
    "stderr": 0.25,
    "n": 4,
}


@pytest.mark.parametrize(
    ("place", "wrong"),
    [(name, wrong) for name in SCORE for wrong in (GONE, [], None)
     if wrong is not None or name not in ("value", "stderr")],
)  # fmt: skip
def test_a_damaged_score_is_refused(tmp_path: Path, place: str, wrong: Any) -> None:
    read = lm_eval._score  # pyright: ignore[reportPrivateUsage]
    path, detail = tmp_path / "lm_eval.jsonl", spoilt(SCORE, place, wrong)
    with pytest.raises(RunError, match=r"lm_eval\.jsonl, record k: .*Delete that line"):
        read(Observation(600, "acc", "words", 0.0, 0, detail=detail), path, "k")
    refuse = lm_eval._refuse_lost  # pyright: ignore[reportPrivateUsage]
    if place in ("method", "task", "length"):
        (tmp_path / "lm_eval.json").write_text(json.dumps({"rows": [detail]}))
        with pytest.raises(LongctxError, match=r"lm_eval\.json: rows\[0\].*Name another folder"):
            refuse(tmp_path, set(), ("method", "length"))


def test_scores_of_today_are_read() -> None:
    read = lm_eval._score  # pyright: ignore[reportPrivateUsage]
    found = read(Observation(600, "acc", "words", 0.0, 0, detail=SCORE), None, "k")
    assert found == lm_eval.Score(**SCORE)
