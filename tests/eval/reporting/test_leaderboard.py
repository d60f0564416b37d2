"""The leaderboard: all sweeps on one page, rows together where a task had the same settings."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from longctx.cli.main import main
from longctx.errors import RunError
from longctx.eval.reporting.leaderboard import folders_of, write_leaderboard

from ..runs import NASTY, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with the same tasks, and one that was asked fewer prompts."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "small", model="small")
    write_run(root / "large", model=f"large {NASTY}", methods=("none", "linear:4"))
    write_run(root / "quick", model="quick", samples=4)
    return root


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_rows_of_one_setting_stand_in_one_table(runs: Path, tmp_path: Path) -> None:
    page = write_leaderboard(folders_of([runs]), tmp_path / "board.html").read_text()
    assert headings(page).count("passkey") == 2  # 20 prompts, and 4
    assert headings(page).count("repetition") == 1
    first = page.partition("data-better")[2].partition("</table>")[0]
    assert first.count("<tr>") == 1 + 4
    assert "linear:4" in first
    assert "quick" not in first
    assert "quick" not in page.partition("<h2>")[0]  # the most prompts say how far models read


def test_perplexities_share_a_table_only_over_the_same_tokens(runs: Path, tmp_path: Path) -> None:
    def tables() -> int:
        page = write_leaderboard(folders_of([tmp_path]), tmp_path / "b.html", overwrite=True)
        return headings(page.read_text()).count("perplexity")

    for name in ("small", "large"):
        shutil.copytree(runs / name, tmp_path / name)
    path = tmp_path / "large" / "sweep.json"
    stored = path.read_text()
    assert tables() == 1
    other_text = json.loads(stored)
    (task,) = (task for task in other_text["tasks"] if task["name"] == "perplexity")
    task["scope"] = {**task["spec"], "text": ["another"]}
    path.write_text(json.dumps(other_text))
    assert tables() == 2
    other_tokenizer = json.loads(stored)
    other_tokenizer["identity"]["tokenizer"] = "another"
    path.write_text(json.dumps(other_tokenizer))
    (tmp_path / "large" / "results.jsonl").unlink()
    assert tables() == 2


def test_the_page_asks_nothing_of_a_network_and_runs_nothing_of_a_run(
    runs: Path, tmp_path: Path
) -> None:
    page = write_leaderboard(folders_of([runs]), tmp_path / "board.html").read_text()
    assert NASTY not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)


def test_a_sweep_of_readings_is_read_back(tmp_path: Path) -> None:
    """A row without a window makes none of the others a float."""
    import longctx
    from longctx.eval import Passkey, sweep, write_sweep

    model, tokenizer = longctx.load("demo")
    result = sweep(
        model, tokenizer, Passkey(samples=1, haystack="grass"), [300],
        methods=["none", "read:map"], results=tmp_path / "run" / "results.jsonl", progress=False,
    )  # fmt: skip
    write_sweep(result, tmp_path / "run")
    write_leaderboard(folders_of([tmp_path]), tmp_path / "board.html")


def test_what_cannot_be_ranked_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match="is not a folder"):
        folders_of([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"holds no sweep\.json"):
        folders_of([tmp_path / "empty"])
    out = tmp_path / "board.html"
    assert main(["leaderboard", str(runs), "--out", str(out)]) == 0
    assert "3 sweeps" in capsys.readouterr().out
    assert main(["leaderboard", str(runs), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    results = runs / "small" / "results.jsonl"
    assert main(["leaderboard", str(runs), "--out", str(results), "--overwrite"]) == 2
    assert "not an HTML page" in capsys.readouterr().err
