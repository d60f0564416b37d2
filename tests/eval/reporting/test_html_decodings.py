"""Decode benches in the HTML report, alone and beside sweeps."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from longctx.cli.main import main
from longctx.errors import RunError
from longctx.eval.decoding.reader import read_decode_benches
from longctx.eval.decoding.result import TEXT
from longctx.eval.reporting.html import write_html
from longctx.eval.reporting.scatter import decoding_styles

from ..benches import DECODINGS, bench_of, write_bench
from ..runs import NASTY, write_run


class _Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    def having(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in attributes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_bench(folder / "run")
    write_bench(folder / "two", "tiny", "other")
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> _Page:
    (path,) = write_html([folder / "run"], folder / "alone.html")
    return _Page(path)


def test_what_is_written_is_read_back(folder: Path) -> None:
    (found,) = read_decode_benches(folder / "run")
    wanted = bench_of()
    assert repr(found) == repr(wanted)  # NaN is not equal to itself


def test_alone_it_shows_both_blocks_and_nothing_of_sweeps(page: _Page) -> None:
    said = " ".join(page.said)
    for text in ("How tiny writes", "20.5", "18.0–23.0", "0.125", "1,234", "1,100–1,368", "7.00"):
        assert text in said
    assert "0.000–0.750" in said  # an end of a t interval below 0 is cut
    assert "documents as clusters" in said
    assert "What it took" not in said
    assert "What each task" not in said
    targets = {str(a.get("href")) for a in page.having("href")} - {"data:,"}
    assert targets <= {f"#{tag['id']}" for tag in page.having("id")}
    assert targets == {"#models", "#decodings", "#loops", "#settings"}


def test_a_point_a_decoding_in_each_picture(page: _Page) -> None:
    points = page.having("data-point")
    assert [p["data-point"] for p in points] == [TEXT, *DECODINGS] * 2
    assert "seq-rep-4 0.125 (0.100–0.150)" in str(points[1]["aria-label"])
    for point in points:
        assert 0 <= float(str(point["cx"])) <= 400
        assert 0 <= float(str(point["cy"])) <= 300


def test_decodings_look_different() -> None:
    names = [
        *DECODINGS,
        "penalty",
        "no_repeat",
        "beam",
        "contrastive",
        "noise",
        "chat",
        "retrieval",
    ]
    looks = decoding_styles([bench_of(decodings=names)])
    assert len(set(looks.values())) == len(names) + 1


def test_loops_are_to_be_read_and_hostile_ones_are_text(page: _Page) -> None:
    assert len(page.having("data-loop")) == 2
    shown = page.text.partition('<script type="application/json"')[0]
    assert NASTY not in page.text
    assert "\u202e" not in shown
    assert "\\u202e" in shown
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "25.0% end in a loop, 2 shown" in " ".join(page.said)
    assert f"…{'p' * 160}<" in shown


def test_beside_sweeps_and_with_models_of_one_name(folder: Path) -> None:
    write_run(folder / "sweep")
    (path,) = write_html([folder / name for name in ("run", "sweep", "two")], folder / "all.html")
    page = _Page(path)
    said = " ".join(page.said)
    assert "How far tiny reads, and how tiny (run), tiny (two), other write" in said
    assert [t["data-decodings"] for t in page.having("data-decodings")] == [
        "tiny (run)",
        "tiny (two)",
        "other",
    ]
    data: Any = json.loads(next(text for text in page.said if text.startswith('{"longctx"')))
    assert len(data["decodings"]) == 3
    assert len(data["runs"]) == 1


def test_a_folder_of_both_shows_both(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    write_bench(tmp_path / "run", "tiny")
    (path,) = write_html([tmp_path / "run"], tmp_path / "both.html")
    said = " ".join(_Page(path).said)
    assert "What it took" in said
    assert "What each decoding makes of it" in said


def _damaged(folder: Path, change: Any) -> None:
    path = folder / "decodings.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda s: s.clear(), "length >= 1"),
        (lambda s: s.append(s[0]), "two benches of one model name"),
        (lambda s: s[0].pop("model_block"), "model_block"),
        (lambda s: s[0]["decoding_block"].pop(TEXT), "lacks 'the text itself'"),
        (lambda s: s[0]["examples"].update(beam=[]), "'beam', which is not in decoding_block"),
        (lambda s: s[0]["settings"].update(prompts=0), "prompts=0"),
        (
            lambda s: s[0]["decoding_block"]["dry"]["loops"].update(value="x"),
            "expected float | null",
        ),
    ],
)
def test_a_damaged_file_is_told(change: Any, found: str, tmp_path: Path) -> None:
    write_bench(tmp_path / "run")
    _damaged(tmp_path / "run", change)
    with pytest.raises(RunError, match=r"decodings\.json") as error:
        write_html([tmp_path / "run"], tmp_path / "page.html")
    assert found in str(error.value)
    assert "decode-bench" in str(error.value)


def test_what_is_refused(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"neither sweep.json nor decodings.json"):
        write_html([tmp_path / "empty"], tmp_path / "page.html")
    with pytest.raises(RunError, match=r"no folder .*none: expected .*decode-bench"):
        write_html([tmp_path / "none"], tmp_path / "page.html")
    with pytest.raises(RunError, match="--plots draws what sweeps found"):
        write_html([folder / "run"], tmp_path / "page.html", plots=True)
    assert main(["report", str(folder / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out
