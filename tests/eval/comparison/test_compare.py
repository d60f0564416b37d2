"""Sweeps side by side: the same figures as scipy gives, and nothing compared that is not alike."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from longctx.errors import RunError
from longctx.eval import (
    Observation,
    Passkey,
    Perplexity,
    Repetition,
    Row,
    SweepResult,
    Task,
    compare,
)
from longctx.eval.comparison.comparison import Comparison
from longctx.eval.comparison.differences import bonett_price
from longctx.eval.reporting.files import write_comparison
from longctx.eval.reporting.plots import draw_comparison
from longctx.eval.reporting.tables import print_comparison, regressions
from longctx.eval.results.records import Record
from longctx.eval.results.sweep_result import rows_of
from longctx.eval.results.variants import Variant

LENGTHS = (256, 512)
ASKED, READ = Passkey(samples=8, text=()), Perplexity(last=100)
PREFIX = {"prefix_nll": 1.0, "prefix_targets": 1}
Answers = Mapping[int, Sequence[bool | None]]
Losses = Mapping[int, Sequence[float]]


def answers(said: Answers, clusters: str = "abcdefgh") -> list[Observation]:
    """Passkey observations by length; None is a NaN."""
    return [
        Observation(n, str(i), cluster, math.nan if right is None else 1.0, 5, right)
        for n, rights in said.items()
        for i, (right, cluster) in enumerate(zip(rights, clusters, strict=False))
    ]


def windows(nlls: Losses, documents: str = "abcd") -> list[Observation]:
    """Perplexity observations by length, 100 targets each."""
    return [
        Observation(n, f"{name}@{i}", name, 100 * nll, 100, detail=PREFIX)
        for n, values in nlls.items()
        for i, (nll, name) in enumerate(zip(values, documents, strict=True))
    ]  # fmt: skip


def swept(
    methods: dict[str, dict[str, list[Observation]]],
    *,
    model: str = "m",
    tokenizer: str = "t",
    chat_template: str = "c",
    tasks: Sequence[Task] = (ASKED, READ),
    failed: dict[str, int] | None = None,
    window: int | None = 256,
) -> SweepResult:
    """A sweep that found these observations; `failed`: a length that a method's passkey lacks."""
    rows: list[Row] = []
    records: list[Record] = []
    variants = [Variant(label, (), None, None, True) for label in methods]
    lengths = sorted({o.length for m in methods.values() for found in m.values() for o in found})
    for variant in variants:
        for task in tasks:
            found = methods[variant.label].get(task.name, [])
            own = [
                Record(f"{variant.label} {task.name} {n}", variant.label, task.name, (n,), n, 1.0,
                       "made up", tuple(o for o in found if o.length == n))
                for n in lengths
            ]  # fmt: skip
            if task.name == "passkey" and failed and variant.label in failed:
                n = failed[variant.label]
                own.append(dataclasses.replace(
                    own[lengths.index(n)], key=f"{variant.label} failed", failed="out of memory"
                ))  # fmt: skip
            records += own
            rows += rows_of(variant, task, lengths, own)
    return SweepResult(
        model, {"model": model, "tokenizer": tokenizer, "chat template": chat_template}, window,
        tuple(lengths), tuple(tasks), tuple(variants), tuple(rows), tuple(records), (), None,
    )  # fmt: skip


BASE = {256: [True] * 8, 512: [True, True, False, False, True, False, True, False]}
LATER = {256: [True] * 2 + [False] * 6, 512: [True, False, True, False, True, True, True, True]}
BASE_NLL = {256: [3.0, 3.2, 2.9, 3.4], 512: [3.1, 3.0, 2.8, 3.3]}
LATER_NLL = {256: [3.1, 3.35, 2.95, 3.6], 512: [3.0, 3.1, 2.9, 3.25]}


def one(said: Answers, nlls: Losses, **how: Any) -> SweepResult:
    return swept({"none": {"passkey": answers(said), "perplexity": windows(nlls)}}, **how)


@pytest.fixture
def comparison() -> Comparison:
    return compare({"base": one(BASE, BASE_NLL), "new": one(LATER, LATER_NLL, model="other")})


def test_a_cell_of_answers_is_an_exact_mcnemar_test(comparison: Comparison) -> None:
    row = comparison.row("passkey", 256, "new")
    assert (row.value, row.difference, row.paired, row.n) == (2 / 8, -6 / 8, 8, 8)
    assert row.p_value == stats.binomtest(0, 6).pvalue == 2 / 2**6
    row = comparison.row("passkey", 512, "new")  # lost 1, won 3: from 4 of 8 to 6 of 8
    assert row.difference == 2 / 8
    assert row.p_value == pytest.approx(stats.binomtest(1, 4).pvalue)
    # won 4/10, lost 2/10: 0.2 ∓ 1.96 · √((0.6 − 0.04) / 10)
    assert (row.difference_low, row.difference_high) == pytest.approx((-0.2638, 0.6638), abs=1e-4)


def test_bonett_and_price_by_hand() -> None:
    # lost 1 and won 5 of 20 prompts, half a prompt more in each cell: 2/22 and 6/22
    reach = 1.959964 * math.sqrt((8 / 22 - (4 / 22) ** 2) / 22)
    assert bonett_price(1, 5, 20) == pytest.approx((4 / 22 - reach, 4 / 22 + reach))
    assert bonett_price(0, 10, 10)[1] == 1.0
    low, high = bonett_price(0, 0, 10)
    assert low == -high < 0, "no difference seen is not a difference of 0"


def test_the_bonett_price_interval_covers() -> None:
    rng = np.random.default_rng(0)
    draws = rng.multinomial(40, [0.15, 0.3, 0.55], size=2000)
    covered = [low <= 0.15 <= high for low, high in (bonett_price(a, b, 40) for a, b, _ in draws)]
    assert 0.93 < np.mean(covered) < 0.98


def test_a_cell_of_text_is_a_paired_t_test_over_documents(comparison: Comparison) -> None:
    row = comparison.row("perplexity", 256, "new")
    known: Any = stats.ttest_rel(LATER_NLL[256], BASE_NLL[256])
    assert row.difference == pytest.approx(0.125)
    assert row.p_value == pytest.approx(known.pvalue)
    interval = known.confidence_interval(0.95)
    assert (row.difference_low, row.difference_high) == pytest.approx((interval.low, interval.high))
    assert row.value == pytest.approx(math.exp(np.mean(LATER_NLL[256])))


def test_intervals_can_be_a_bootstrap_of_documents_and_haystacks(comparison: Comparison) -> None:
    runs = {"base": one(BASE, BASE_NLL), "new": one(LATER, LATER_NLL, model="other")}
    drawn = compare(runs, interval="bootstrap")
    change = np.subtract(LATER_NLL[256], BASE_NLL[256])
    cell = stats.bootstrap((change,), np.mean, method="BCa", n_resamples=9_999, rng=1)
    row, before = drawn.row("perplexity", 256, "new"), comparison.row("perplexity", 256, "new")
    low, high = cell.confidence_interval
    assert (row.difference_low, row.difference_high) == pytest.approx((low, high), abs=0.01)
    assert row.interval == "BCa bootstrap over 4 clusters, 95%"
    assert (row.difference, row.p_value) == (before.difference, before.p_value)
    assert row.difference_high - row.difference_low < before.difference_high - before.difference_low
    right = np.subtract(LATER[512], BASE[512], dtype=float)
    cell = stats.bootstrap((right,), np.mean, method="BCa", n_resamples=9_999, rng=1)
    row = drawn.row("passkey", 512, "new")
    assert (row.difference_low, row.difference_high) == pytest.approx(cell.confidence_interval)
    assert all(one.interval.startswith("BCa bootstrap over") for one in drawn.pooled)
    assert all("bootstrap" in task.compared for task in drawn.tasks)
    assert not any("bootstrap" in task.compared for task in comparison.tasks)
    with pytest.raises(RunError, match="expected t or bootstrap"):
        compare(runs, interval="wald")  # pyright: ignore[reportArgumentType]


def test_holm_is_over_all_cells_of_an_entry(comparison: Comparison) -> None:
    rows = [row for row in comparison.rows if row.entry == "new"]
    ranked = sorted(rows, key=lambda row: row.p_value)
    floor = 0.0
    for place, row in enumerate(ranked):
        floor = max(floor, min(1.0, (4 - place) * row.p_value))
        assert row.p_holm == pytest.approx(floor)
        assert row.significant == (floor < 0.05)
    assert all(math.isnan(row.p_holm) for row in comparison.rows if row.entry == "base")


def test_pooled_answers_flip_the_signs_of_clusters(comparison: Comparison) -> None:
    (found,) = [one for one in comparison.pooled if one.task == "passkey"]
    totals = np.array(
        [sum(int(LATER[n][i]) - int(BASE[n][i]) for n in LENGTHS) for i in range(8)], float
    )
    known = stats.permutation_test(
        (totals,), np.sum, permutation_type="samples", n_resamples=10_000
    )
    assert found.difference == totals.sum() / 16
    assert found.p_value == pytest.approx(known.pvalue)
    interval = stats.ttest_1samp(totals / 2, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.paired, found.clusters) == (16, 8)


def test_pooled_text_is_t_over_documents_not_windows(comparison: Comparison) -> None:
    (found,) = [one for one in comparison.pooled if one.task == "perplexity"]
    later, before = (np.mean([nll[n] for n in LENGTHS], axis=0) for nll in (LATER_NLL, BASE_NLL))
    assert found.p_value == pytest.approx(stats.ttest_rel(later, before).pvalue)
    assert (found.paired, found.clusters) == (8, 4)


def test_the_cost_inside_the_old_window_is_said_in_words(comparison: Comparison) -> None:
    found = {one.task: one for one in comparison.inside}
    assert {one.lengths for one in found.values()} == {(256,)}
    asked = found["passkey"]
    assert asked.p_value == asked.smallest_p == 2 / 2**6
    read: Any = stats.ttest_rel(LATER_NLL[256], BASE_NLL[256])
    assert asked.p_holm == found["perplexity"].p_holm == pytest.approx(2 * read.pvalue), (
        "Holm of two"
    )
    said = {said.partition(":")[0]: said for said in regressions(comparison)}
    assert "perhaps: −75 pts (95% −114" not in said["new, passkey"], "no share falls by more than 1"
    assert "perhaps: −75 pts (95% −100 to −36; p = 0.031, adjusted 0.061" in said["new, passkey"]
    assert "8 pairs in 8 clusters, lengths 256" in said["new, passkey"]
    assert "perhaps: +13.3% of perplexity (95% +2.3% to" in said["new, perplexity"]


@pytest.mark.parametrize(
    ("later", "verdict"),
    [
        ([True] * 8, "no cost shown: 0 pts (no interval: no pair differs; p = 1"),
        ([False] * 8, "yes, it costs: −100 pts (no interval: all 8 clusters differ alike"),
        ([False] * 3 + [True] * 5, "undecided (so few clusters differ that no p below 0.25 is"),
    ],
)
def test_each_verdict(later: list[bool], verdict: str) -> None:
    runs = [swept({"none": {"passkey": answers({256: s})}}) for s in ([True] * 8, later)]
    (asked, read) = regressions(compare({"base": runs[0], "new": runs[1]}))
    assert verdict in asked
    assert read.endswith("nothing was compared at up to 256 tokens, so nothing is known.")


def test_no_old_window_is_said() -> None:
    run = one(BASE, BASE_NLL, window=None)
    assert regressions(compare({"a": run, "b": run})) == (
        "a names no original window, so there is no inside.",
    )


def test_nan_and_failed_cells_are_no_wrong_answers() -> None:
    nan = {**LATER, 256: [None, *LATER[256][1:]]}
    later = swept(
        {"none": {"passkey": answers(nan), "perplexity": windows(LATER_NLL)}}, failed={"none": 512}
    )
    found = compare({"base": one(BASE, BASE_NLL), "new": later})
    for length, why in ((256, "NaN or infinity in 1 of 8"), (512, "out of memory")):
        row = found.row("passkey", length, "new")
        assert why in str(row.failed)
        assert math.isnan(row.value)
        assert math.isnan(row.difference)
        assert row.paired == 0
        assert any(why in sentence for sentence in found.missing)
    assert not [one for one in found.pooled if one.task == "passkey"]
    assert found.row("perplexity", 256, "new").paired == 4
    found = compare({"new": later, "base": one(BASE, BASE_NLL)})
    assert found.row("passkey", 512, "base").value == 4 / 8
    assert found.row("passkey", 512, "base").unpaired == "new failed: out of memory"


def test_what_one_run_lacks_is_listed() -> None:
    short = one({256: LATER[256]}, {256: LATER_NLL[256]})
    found = compare({"base": one(BASE, BASE_NLL), "new": short})
    assert found.missing == (
        "passkey at 512, new: not measured in new",
        "perplexity at 512, new: not measured in new",
    )
    (pooled, _) = found.pooled
    assert (pooled.lengths, pooled.left_out) == ((256,), (512,))
    text_only = swept({"none": {"perplexity": windows(LATER_NLL)}}, tasks=[READ])
    found = compare({"base": one(BASE, BASE_NLL), "new": text_only})
    assert "passkey at 256, new: not measured in new" in found.missing


def test_a_subset_of_the_prompts_is_paired() -> None:
    fewer = one({256: LATER[256][:5]}, {256: LATER_NLL[256]})
    row = compare({"base": one(BASE, BASE_NLL), "new": fewer}).row("passkey", 256, "new")
    assert (row.n, row.paired, row.difference) == (5, 5, -3 / 5)


def test_entries_are_named_by_run_and_method() -> None:
    two = swept({"none": {"passkey": answers(BASE)}, "yarn:2": {"passkey": answers(LATER)}})
    assert compare({"only": two}).entries == ("none", "yarn:2")
    assert compare({"a": two, "b": one(BASE, BASE_NLL)}).entries == ("a/none", "a/yarn:2", "b")
    with pytest.raises(RunError, match="two entries are named 'a/none'"):
        compare({"a": two, "a/none": one(BASE, BASE_NLL)})
    with pytest.raises(RunError, match="takes two entries or more, here are 1"):
        compare({"only": one(BASE, BASE_NLL)})


def test_unlike_runs_are_refused() -> None:
    base = one(BASE, BASE_NLL)
    with pytest.raises(RunError, match=r"base and new have different tokenizers .*t and u"):
        compare({"base": base, "new": one(BASE, BASE_NLL, tokenizer="u")})
    with pytest.raises(RunError, match=r"different chat templates, so that no prompt of passkey"):
        compare({"base": base, "new": one(BASE, BASE_NLL, chat_template="u")})
    plain = (dataclasses.replace(ASKED, chat=False), READ)
    tuned = one(BASE, BASE_NLL, chat_template="u", tasks=plain)
    assert compare({"base": one(BASE, BASE_NLL, tasks=plain), "new": tuned}).rows
    other = one(BASE, BASE_NLL, tasks=[dataclasses.replace(ASKED, samples=9, seed=1), READ])
    with pytest.raises(RunError, match=r"settings of passkey: samples 8 and 9, seed 0 and 1\."):
        compare({"base": base, "new": other})
    moved = [*answers({256: LATER[256]}, clusters="hgfedcba")]
    with pytest.raises(RunError, match="item '0' at 256 tokens is not the same input in both"):
        compare({"base": base, "new": swept({"none": {"passkey": moved}})})
    with pytest.raises(RunError, match="nothing in common: not measured in new"):
        compare({"base": base, "new": swept({"none": {"passkey": answers({300: [True]})}})})
    texts = [dataclasses.replace(o, item=f"other {o.item}") for o in windows(LATER_NLL)]
    with pytest.raises(RunError, match=r"nothing in common: .*no prompt or window in common"):
        compare({"base": base, "new": swept({"none": {"perplexity": texts}}, tasks=[READ])})


def test_the_files_hold_the_same_figures(comparison: Comparison, tmp_path: Path) -> None:
    paths = write_comparison(comparison, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in paths}
    report = json.loads((tmp_path / "out/compare.json").read_text(), parse_constant=pytest.fail)
    csv = pd.read_csv(tmp_path / "out/compare.csv")
    parquet = pd.read_parquet(tmp_path / "out/compare.parquet")
    assert len(csv) == len(parquet) == len(report["rows"]) == len(comparison.rows) == 8
    for row, line, stored in zip(comparison.rows, csv.p_holm, report["rows"], strict=True):
        assert line == pytest.approx(row.p_holm, rel=1e-15) or (
            math.isnan(line) and row.entry == "base"
        )
        assert stored["p_holm"] == (None if row.entry == "base" else row.p_holm)
    assert report["regressions"] == list(regressions(comparison))
    assert matplotlib.image.imread(tmp_path / "out/compare.png").shape[1] > 800
    svg = (tmp_path / "out/compare.svg").read_text()
    assert "</svg>" in svg
    with pytest.raises(RunError, match="holds a comparison already"):
        write_comparison(comparison, tmp_path / "out")
    write_comparison(comparison, tmp_path / "out", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        write_comparison(comparison, tmp_path / "file")


def test_no_perplexity_at_all_is_drawn_too() -> None:
    lost = {256: [math.nan] * 4}
    runs = [swept({"none": {"perplexity": windows(n)}}, tasks=[READ]) for n in (BASE_NLL, lost)]
    later = dataclasses.replace(runs[1], lengths=(256,))
    assert draw_comparison(compare({"none": later, "base": runs[0]})).axes[0].get_yscale() == "log"
    assert draw_comparison(compare({"none": later, "same": later})).axes[0].get_yscale() == "linear"


def test_the_map_marks_what_is_significant() -> None:
    many = "abcdefgh"
    base = swept({"none": {"passkey": answers({256: [True] * 8, 512: [True] * 8}, many)}})
    late = swept({"none": {"passkey": answers({256: [False] * 8, 512: [True] * 8}, many)}})
    figure = draw_comparison(compare({"base": base, "new": late}))
    asked, read = figure.axes[1], figure.axes[3]
    assert [text.get_text() for text in asked.texts] == ["−100 pts*", "0 pts"]
    assert len(asked.patches) == 1, "one frame"
    assert [text.get_text() for text in read.texts] == ["–", "–"]
    assert [patch.get_hatch() for patch in read.patches] == ["///", "///"]


def test_the_table_says_what_it_shows(comparison: Comparison) -> None:
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=300))
    text = out.getvalue()
    for wanted in ("passkey · against base", "−75 pts", "+13.3%", "Inside the old window"):
        assert wanted in text
    for wanted in (ASKED.estimand, "exact McNemar", "t over documents", *regressions(comparison)):
        assert wanted in text


def test_every_column_is_printed_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    many = {n: [True, False] * 4 for n in range(256, 256 * 13, 256)}
    runs = [swept({"none": {"passkey": answers(many)}}, tasks=[ASKED]) for _ in range(2)]
    print_comparison(compare({"base": runs[0], "an entry of a long name": runs[1]}))
    shown = capsys.readouterr().out
    assert "an entry of a long name" in shown
    assert "3,072" in shown
    assert "the difference and its interval" in " ".join(shown.split())


WRITTEN = {"less": [0.1, 0.2, 0.15, 0.3], "more": [0.3, 0.5, 0.35, 0.4]}


def test_repetition_is_a_share_of_which_less_is_better() -> None:
    def wrote(shares: Sequence[float]) -> SweepResult:
        found = [
            Observation(256, f"{name}@0", name, 0.0, 0, detail={"seq_rep_4": share})
            for name, share in zip("abcd", shares, strict=True)
        ]
        return swept({"none": {"repetition": found}}, tasks=[Repetition()])

    found = compare({"base": wrote(WRITTEN["less"]), "new": wrote(WRITTEN["more"])})
    row = found.row("repetition", 256, "new")
    known: Any = stats.ttest_rel(WRITTEN["more"], WRITTEN["less"])
    assert row.difference == pytest.approx(0.2)
    assert row.p_value == pytest.approx(known.pvalue)
    out = io.StringIO()
    print_comparison(found, Console(file=out, width=300))
    assert "39%" in out.getvalue()
    assert "less is better" in out.getvalue()
    assert "yes, it costs: +20 pts" in regressions(found)[0]
    back = compare({"base": wrote(WRITTEN["more"]), "new": wrote(WRITTEN["less"])})
    assert "no, it gains: −20 pts" in regressions(back)[0]
    values, _, *_ = draw_comparison(found).axes
    assert values.get_yscale() == "linear"
