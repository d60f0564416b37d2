"""The report in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from longctx.eval.reporting.html import write_html
from longctx.eval.reporting.leaderboard import write_leaderboard

from ..benches import DECODINGS, write_bench
from ..runs import WIDE_METHODS, write_run, write_wide_run

pytestmark = pytest.mark.browser

_CHROMIUM = shutil.which("chromium")
_QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_METHODS = ("none", *(f"{name}:{n}" for name in ("linear", "ntk", "yarn") for n in (2, 4)))


@dataclass
class _Tab:
    page: Any
    requests: list[str] = field(default_factory=list[str])
    complaints: list[str] = field(default_factory=list[str])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if _CHROMIUM is None:
        pytest.skip("apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=_QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    lengths = (256, 512, 1024, 2048, 4096)
    write_run(folder / "run", methods=_METHODS, lengths=lengths, failed=4096)
    write_run(folder / "other", model="a/very-long-name-of-a-checkpoint-of-7B-instruct")
    write_bench(folder / "bench", "tiny", "a/very-long-name-of-a-checkpoint-of-7B-instruct")
    runs = [folder / name for name in ("run", "other", "bench")]
    write_html(runs, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(params=[("light", 1280), ("light", 360), ("dark", 1280), ("dark", 360)], ids=str)
def tab(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[_Tab]:
    scheme, width = request.param
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(120_000)  # of a machine that is busy
    tab = _Tab(page)
    page.on("request", lambda request: tab.requests.append(request.url))
    page.on("console", lambda message: tab.complaints.append(message.text))
    page.on("pageerror", lambda error: tab.complaints.append(str(error)))
    page.goto(report.as_uri())
    yield tab
    page.close()


def test_it_opens_alone_and_fits(tab: _Tab, report: Path) -> None:
    tab.page.wait_for_load_state("networkidle")
    assert tab.requests == [report.as_uri()]
    assert tab.complaints == []
    assert "Context report" in tab.page.title()
    wide, shown = tab.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= shown


def test_both_themes_have_contrast_and_the_button_changes_them(tab: _Tab) -> None:
    # Relative luminance and contrast of WCAG 2, for every colour that text stands on.
    contrast = """element => {
        const luminance = text => {
            const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => {
                const c = v / 255;
                return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const own = getComputedStyle(element);
        let under = element;
        while (getComputedStyle(under).backgroundColor === "rgba(0, 0, 0, 0)")
            under = under.parentElement;
        const [a, b] = [own.color, getComputedStyle(under).backgroundColor].map(luminance);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }"""
    texts = "h1, .soft, nav a, td small, .bad, thead th, #theme, td[data-hits], .itself, mark"
    grounds: list[str] = []
    for _ in range(2):
        found = tab.page.locator(texts).evaluate_all(f"all => all.map({contrast})")
        assert min(found) >= 4.5
        grounds.append(tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        tab.page.locator("#theme").click()
    assert len(set(grounds)) == 2


def test_tips_show_on_hover_tap_and_focus(tab: _Tab) -> None:
    tip = tab.page.locator("#tip")
    cells = tab.page.locator("td[data-hits]")
    assert tip.is_hidden()
    cells.nth(1).hover()
    assert tip.inner_text() == cells.nth(1).get_attribute("aria-label")
    tab.page.mouse.move(1, 1)
    assert tip.is_hidden()
    cells.nth(2).click()
    assert " found: " in tip.inner_text()
    tab.page.keyboard.press("Escape")
    assert tip.is_hidden()
    cells.nth(0).focus()
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("ArrowDown")
    wanted = cells.nth(0).evaluate(
        "cell => cell.parentElement.nextElementSibling.cells[2].getAttribute('aria-label')"
    )
    assert tip.inner_text() == wanted
    left, right, width = tip.evaluate(
        "tip => [tip.getBoundingClientRect().left, tip.getBoundingClientRect().right, innerWidth]"
    )
    assert 0 <= left < right <= width
    zone = tab.page.locator(".zone").nth(1)
    zone.focus()
    assert tip.inner_text() == zone.get_attribute("aria-label")
    assert tip.inner_text().count("n=20") == len(_METHODS)


def test_the_shown_figures_are_those_of_sweep_json(tab: _Tab, report: Path) -> None:
    saved = json.loads((report.parent / "run" / "sweep.json").read_text())
    rows = {(r["task"], r["method"], r["length"]): r for r in saved["rows"]}
    for task in ("passkey", "perplexity"):
        lines = tab.page.locator(f'[data-values="tiny|{task}"] tbody tr').evaluate_all(
            "lines => lines.map(line => [...line.cells].map(cell => cell.innerText))"
        )
        assert [line[0] for line in lines] == list(_METHODS)
        for method, *cells in lines:
            for cell, length in zip(cells, saved["lengths"], strict=True):
                row = rows[task, method, length]
                text = cell.split()[0].rstrip("*")
                if row["value"] is None:
                    assert text == "failed"
                elif task == "passkey":
                    assert text == f"{row['value']:.0%}"
                else:
                    assert float(text) == pytest.approx(row["value"], rel=0.005)


def test_a_pressed_method_is_brought_out(tab: _Tab) -> None:
    tab.page.locator('[data-lit="yarn:4"]').first.click()
    assert tab.page.locator('g[data-method="yarn:4"]').first.get_attribute("class") == "lit"
    assert tab.page.locator('g[data-method="none"]').first.get_attribute("class") == "dim"


def test_a_leaderboard_is_sorted_and_filtered(browser: Any, report: Path) -> None:
    board = report.with_name("board.html")
    write_leaderboard([report.with_name("run"), report.with_name("other")], board)
    for width in (1280, 360):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.set_default_timeout(120_000)
        page.goto(board.as_uri())
        wide, shown = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= shown
        table = page.locator("table[data-better]").first
        head = table.locator("thead th", has_text="method")
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        methods = table.locator("tbody tr td:nth-child(2)").all_inner_texts()
        assert methods == sorted(methods)
        values = "all => all.map(cell => cell.dataset.sort)"
        length = table.locator("thead th", has_text="256").first
        length.locator("button").click()
        column = length.evaluate("head => head.cellIndex") + 1
        cells = table.locator(f"tbody tr td:nth-child({column})")
        known = [float(text) for text in cells.evaluate_all(values) if text]
        assert known == sorted(known, reverse=True)
        assert table.locator(".best").count() > 0
        page.locator("#filter").fill("7B-instruct")
        assert table.locator("tbody tr:visible").count() == 2
        page.close()


def test_decodings_are_points_with_tips_and_the_table_fits(tab: _Tab) -> None:
    tip, points = tab.page.locator("#tip"), tab.page.locator("[data-point]")
    assert points.count() == 2 * 2 * (1 + len(DECODINGS))
    points.nth(0).focus()
    tab.page.keyboard.press("ArrowRight")
    assert tip.inner_text() == points.nth(1).get_attribute("aria-label")
    tab.page.keyboard.press("Escape")
    tab.page.locator('[data-lit="dry"]').first.click()
    assert tab.page.locator('g[data-method="dry"]').first.get_attribute("class") == "lit"
    wide, shown = tab.page.locator("[data-decodings]").evaluate_all(
        "all => [Math.max(...all.map(t => t.scrollWidth)), all[0].parentElement.clientWidth]"
    )
    assert wide <= shown


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_wide_run(folder / "run")
    write_html([folder / "run"], folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize(
    ("scheme", "width", "height", "most"),
    [("light", 1400, 900, 8_500), ("dark", 390, 844, 12_000)],
)
def test_14_methods_and_14_tasks_stay_short(
    browser: Any, wide: Path, scheme: str, width: int, height: int, most: int
) -> None:
    assert wide.stat().st_size < 3_600_000
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    page.goto(wide.as_uri())
    root = "document.documentElement"
    tall, across = page.evaluate(f"[{root}.scrollHeight, {root}.scrollWidth]")
    assert tall < most
    assert across <= width
    for first in (".lead", ".first svg", ".first .legend"):  # on the first screen
        box = page.locator(first).first.bounding_box()
        assert box["y"] + box["height"] < height
    assert page.locator(".first > figure g:not(.back)").count() == 4  # none, and 3 families
    reach = page.locator('[data-board$="|reach"]')
    assert reach.locator("tbody tr:not(.family)").count() == len(WIDE_METHODS)
    held, own = reach.evaluate("t => [t.parentElement.clientWidth, t.scrollWidth]")
    assert held <= width
    assert (own > held) == (width == 390), "it scrolls within itself"
    page.locator("details:not([open]) > summary").evaluate_all("all => all.map(s => s.click())")
    assert page.evaluate(f"{root}.scrollWidth") <= width
    cell = reach.locator("td[tabindex]").nth(3)
    cell.click()
    assert page.locator("#tip").inner_text() == cell.get_attribute("aria-label")
    page.close()
