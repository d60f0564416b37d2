"""Adaptive sweeps: the errors they promise, the boundary they find, what they save."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from longctx.errors import RunError
from longctx.eval import Adaptive, Measured, Observation, Passkey, Unit, sweep
from longctx.eval.reporting.files import write_sweep
from longctx.eval.reporting.html import write_html
from longctx.eval.tasks.shared.adaptive import Verdict, boundary
from longctx.prompts.passkey_prompts import SHORT

LENGTHS = (400, 600, 800, 1000, 1200, 1400)


def test_the_decision_is_walds_ratio() -> None:
    rule = Adaptive(threshold=0.8, margin=0.1, error=0.05)
    for n, hits in ((i, j) for i in range(60) for j in range(i + 1)):
        likely = 0.9**hits * 0.1 ** (n - hits) / (0.7**hits * 0.3 ** (n - hits))
        wanted = "pass" if likely >= 19 else "fail" if likely <= 1 / 19 else None
        if min(abs(likely - 19), abs(likely - 1 / 19)) > 1e-9:
            assert rule.decide(hits, n) == wanted
    # Twelve hits in a row, or three misses, are enough.
    assert [rule.decide(n, n) for n in (11, 12)] == [None, "pass"]
    assert [rule.decide(0, n) for n in (2, 3)] == [None, "fail"]


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize(("share", "wrong"), [(0.7, "pass"), (0.9, "fail"), (0.5, "pass")])
def test_errors_are_as_small_as_promised(share: float, wrong: str, step: int) -> None:
    """The exact probability of the wrong decision, by all ways that the hits can come."""
    rule = Adaptive(step=step)
    open_: dict[tuple[int, int], float] = {(0, 0): 1.0}
    decided = {"pass": 0.0, "fail": 0.0}
    for _ in range(600 // step):
        later: dict[tuple[int, int], float] = {}
        for (hits, n), p in open_.items():
            for more in range(step + 1):
                q = p * math.comb(step, more) * share**more * (1 - share) ** (step - more)
                state = (hits + more, n + step)
                verdict = rule.decide(*state)
                if verdict:
                    decided[verdict] += q
                else:
                    later[state] = later.get(state, 0) + q
        open_ = later
    assert sum(decided.values()) == pytest.approx(1, abs=1e-3)
    assert decided[wrong] <= rule.error / (1 - rule.error)


@pytest.mark.parametrize("samples", [4, 20, 103])
def test_errors_with_few_prompts_are_what_simulation_finds(samples: int) -> None:
    rule, rng = Adaptive(), Random(5)
    wanted = rule.errors(samples)
    for share, wrong, p in ((0.7, "pass", wanted[0]), (0.9, "fail", wanted[1])):
        found = 0
        for seed in range(2000):
            hits = [rng.random() < share for _ in range(samples)]
            found += rule.ask(samples, seed, answers(hits)) == wrong
        assert found / 2000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 2000))
    assert (max(wanted) <= rule.error) == (samples > 100)


def answers(hits: Sequence[bool]) -> Any:
    def answer(indices: Sequence[int]) -> list[Observation]:
        return [Observation(9, str(i), "c", 1.0, 1, hits[i]) for i in indices]

    return answer


def test_a_cell_that_stays_open_is_decided_by_its_share() -> None:
    rule = Adaptive(step=4)
    assert rule.ask(10, 0, answers([True] * 8 + [False] * 2)) == "pass"
    assert rule.ask(10, 0, answers([True] * 7 + [False] * 3)) == "fail"
    assert rule.ask(10, 0, lambda _: []) == "not measured", "which is not a failure to read"
    nan = Observation(9, "0", "c", math.nan, 1, None)
    assert rule.ask(10, 0, lambda _: [nan]) == "not measured"


def test_the_order_is_random_and_the_same_again() -> None:
    def order(seed: int) -> list[int]:
        asked: list[int] = []

        def answer(indices: Sequence[int]) -> list[Observation]:
            asked.extend(indices)
            return [Observation(9, str(i), "c", 1.0, 1, i % 2 == 0) for i in indices]

        Adaptive(error=1e-9).ask(30, seed, answer)
        return asked

    assert sorted(order(0)) == list(range(30))
    assert order(0) == order(0) != order(1)
    assert order(0) != sorted(order(0))


def test_the_boundary_of_every_course_without_two_failures_in_a_row() -> None:
    for course in product((True, False), repeat=6):
        asked: list[int] = []

        def measure(length: int, course: Any = course, asked: Any = asked) -> Verdict:
            asked.append(length)
            return "pass" if course[length] else "fail"

        found = boundary(range(6), measure)
        assert len(asked) == len(set(asked))
        if found is not None:
            assert course[found]
        # A single failure with a pass behind it is a dip; two in a row are the end.
        end = next((i for i in range(6) if not any(course[i : i + 2])), 6)
        if not any(course[end:]):
            assert found == (end - 1 if end else None), course


def test_few_lengths_are_asked() -> None:
    for limit in range(65):
        asked: list[int] = []

        def measure(length: int, limit: int = limit, asked: Any = asked) -> Verdict:
            asked.append(length)
            return "pass" if length < limit else "fail"

        assert boundary(range(64), measure) == (limit - 1 if limit else None)
        assert len(asked) <= 13  # two for each of six halvings, and one


@dataclass(frozen=True, slots=True)
class Known(Passkey):
    """Passkeys that are found up to a length, and mostly not beyond; no model is run."""

    limit: int = 900
    memory: int = 10_000
    asked_for: list[int] = field(default_factory=list[int], compare=False)

    def measure(self, model: Any, tokenizer: Any, unit: Unit, **settings: Any) -> Measured:
        (length,) = unit.lengths
        if length > self.memory:
            raise torch.OutOfMemoryError("out of memory")
        share = 1.0 if length <= self.limit else 0.1
        found = tuple(
            Observation(
                length, str(i), "c", 1.0, 5, Random(f"{length}/{i}").random() < share
            )
            for i in unit.spec["prompts"]
        )  # fmt: skip
        self.asked_for.extend([length] * len(found))
        return Measured(found, length * len(found), "not at all")

    def report_identity(self) -> dict[str, Any]:
        return self.cache_key()

    def cache_key(self) -> dict[str, Any]:
        return {"limit": self.limit}


def test_a_sweep_asks_less_and_says_so(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    task = Known(samples=60, haystack="grass", wording=SHORT)

    def run() -> Any:
        return sweep(
            model, tokenizer, [task], LENGTHS, methods=["none", "yarn:2"], adaptive=Adaptive(),
            results=tmp_path / "results.jsonl", progress=False,
        )  # fmt: skip

    result = run()
    asked = len(task.asked_for)
    assert asked < 0.2 * 60 * len(LENGTHS) * 2
    for method in ("none", "yarn:2"):
        note = next(note for note in result.notes if f"under {method}: reads to" in note)
        rows = {row.length: row for row in result.rows if row.method == method}
        assert "reads to 800 tokens at a share of 80% (with at most 60 prompts" in note
        n = sum(row.n for row in rows.values())
        assert f"; {n} of 360 prompts asked" in note
        assert min(rows[800].n, rows[1000].n) > 0
        assert any(row.n == 0 and math.isnan(row.value) and not row.failed for row in rows.values())
    assert all("asked only until it was decided" in row.estimand for row in result.rows)
    write_sweep(result, tmp_path)
    (page,) = write_html([tmp_path], tmp_path / "report.html")
    text = page.read_text()
    assert "was swept adaptively" in text
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert all(one["text"] is one["yarn"] is None for one in data["runs"][0]["effective"])
    again = run()
    assert len(task.asked_for) == asked, "what is known is not asked again"
    assert repr(again.rows) == repr(result.rows)  # NaN is equal to itself in text alone


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (900, "reads to 800 tokens at least (1,000, 1,200 tokens: not measured) at a share"),
        (300, "how far it reads is open (400, 800 tokens: not measured) at a share"),
    ],
)
def test_what_could_not_be_measured_is_no_limit(
    model: Any, tokenizer: Any, memory: int, said: str
) -> None:
    task = Known(samples=20, haystack="grass", wording=SHORT, memory=memory)
    result = sweep(model, tokenizer, [task], LENGTHS, adaptive=Adaptive(), progress=False)
    (note,) = result.notes
    assert said in note


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.95}, "must lie strictly between 0 and 1"),
        ({"error": 0.5}, "expected an error below 0.5"),
        ({"step": 0}, "a step of at least 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        Adaptive(**settings)
