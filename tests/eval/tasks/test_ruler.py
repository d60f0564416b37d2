"""RULER: exact prompts, scores against a naive loop, and against lm-evaluation-harness's own."""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from longctx.errors import DataError
from longctx.eval import Observation, Unit, sweep
from longctx.eval.reporting.files import write_sweep
from longctx.eval.reporting.tables import print_sweep
from longctx.eval.tasks.ruler import Ruler
from longctx.eval.tasks.shared import ruler_source
from longctx.eval.tasks.shared.answering import Question
from longctx.eval.tasks.shared.exact_cut import exact_cut
from longctx.eval.tasks.shared.ruler_prompts import PARTS, Part, family_of
from longctx.scoring.greedy import greedy

from ..conftest import byte_model, byte_tokenizer

OWN = tuple(part for part in PARTS if not part.startswith("qa"))
SHIPPED = ruler_source.is_installed()
needs_ruler = pytest.mark.skipif(not SHIPPED, reason="RULER's words are not installed")


@pytest.fixture
def own_words(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where nothing of RULER is installed."""
    monkeypatch.setattr(ruler_source, "_folder", lambda package: None)
    for cached in (ruler_source.essays, ruler_source.wordlist):
        cached.cache_clear()
    yield
    for cached in (ruler_source.essays, ruler_source.wordlist):
        cached.cache_clear()


def question(part: Part, length: int, index: int = 0, **fields: Any) -> tuple[Question, str]:
    task, tokenizer = Ruler(**fields), byte_tokenizer()
    unit = Unit((length,), length, {"part": part, "prompts": [index]})
    ((_, found),) = task.questions(tokenizer, unit)
    return found, str(tokenizer.decode(list(found.input_ids), skip_special_tokens=True))


# Bytes: RULER's 4k are about 16k of them.
@pytest.mark.parametrize("part", OWN)
def test_prompt_and_answer_fill_the_length(part: Part, own_words: None) -> None:
    texts = set[str]()
    for length in (6000, 6001):
        found, text = question(part, length)
        assert len(found.input_ids) + found.new_tokens == length
        assert found.part == part
        texts.add(text)
        assert found.context_end is not None
        asked = str(byte_tokenizer().decode(list(found.input_ids[found.context_end :])))
        assert text.endswith(asked)
        assert 40 < len(asked) < 400
        assert not any(reference in asked for reference in found.references)
        again, same = question(part, length)
        assert (again, same) == (found, text)
        _check_answer(part, found, text)
    texts.add(question(part, 6000, 1)[1])
    texts.add(question(part, 6000, seed=1)[1])
    assert len(texts) == 4


def _check_answer(part: Part, found: Question, text: str) -> None:
    """That the references are what a reader would find."""
    if part.startswith("niah"):
        keys = re.findall(r"([a-z0-9-]+) is: (\S+)\.", text)
        asked = text[text.rindex("What ") :]
        assert {value for key, value in keys if key in asked} == set(found.references)
        assert len(keys) == len({value for _, value in keys})
    elif part == "vt":
        value = re.findall(r"value (\d+) in", text)[-1]
        holds = set(re.findall(rf"VAR (\w+) = {value}", text))
        for name, other in re.findall(r"VAR (\w+) = VAR (\w+)", text):
            holds |= {name} if other in holds else set()
        assert holds == set(found.references)
        assert len(holds) == 5
    else:
        body = text[text.rindex("Keep in mind which") if part == "cwe" else 0 : text.rindex("Que")]
        words = re.findall(r"\d+\. (\S+)", body) if part == "cwe" else re.findall(r"\w{6}\b", body)
        often = [word for word, _ in Counter(words).most_common(len(found.references))]
        assert set(often) == set(found.references)
        assert len(often) == (10 if part == "cwe" else 3)


@needs_ruler
@pytest.mark.parametrize("part", ["qa_1", "qa_2"])
def test_documents_hold_the_answer(part: Part) -> None:
    for index in range(2):
        found, text = question(part, 30_000, index)
        assert len(found.input_ids) + found.new_tokens == 30_000
        documents = re.split(r"Document \d+:\n", text[: text.rindex("Answer the question")])
        assert len(documents) > 20
        if part == "qa_1":  # HotpotQA has answers such as "yes"
            assert any(reference in text for reference in found.references)
    assert question("qa_1", 30_000, 0)[0].cluster.startswith("qa_1/")


@needs_ruler
def test_the_words_are_rulers() -> None:
    """Each prompt is RULER's template around what is drawn."""
    for part in ("niah_multivalue", "vt", "cwe", "fwe", "qa_1"):
        words = ruler_source.template(family_of(part))
        found, text = question(part, 30_000)
        pieces = re.split(r"\{\w+\}", words.text)
        assert all(piece in text for piece in pieces if len(piece) > 20)
        prefix = re.split(r"\{\w+\}", words.prefix)[0]
        assert prefix in text[-400:]
        assert found.new_tokens == words.new_tokens
    assert question("niah_single_1", 6000)[1].startswith("A special magic number is hidden")
    assert question("niah_single_1", 6000)[1].endswith("mentioned in the provided text is")


def test_scores_are_rulers() -> None:
    task = Ruler(only=("vt",))
    asked = Question("vt/0", "vt/0", (1,), ("ABC", "def"), 9, part="vt")
    assert task.score(asked, "abc\x00 and DEF") == 1
    assert task.score(asked, "abcde") == 0.5
    assert not task.is_settled(asked, "abcde")
    either = Question("qa_1/0", "qa_1/x", (1,), ("ABC", "def"), 9, part="qa_1")
    assert task.score(either, "it is abcde") == 1
    assert task.score(either, "no") == 0


def test_scores_are_those_of_a_naive_loop(own_words: None) -> None:
    """One prompt at a time, by `generate` without early ends, scored by hand."""
    model, tokenizer = byte_model(), byte_tokenizer()
    task = Ruler(only=("vt", "fwe"), samples=2)
    plan = task.plan(tokenizer, (2400,), length_invariant=True)
    for unit in plan.units:
        asked = task.questions(tokenizer, unit)
        found = task.measure(model, tokenizer, unit, batch_tokens=1, length_invariant=True)
        assert found.tokens > 0
        for (_, one), observed in zip(asked, found.observations, strict=True):
            ids = greedy(model, torch.tensor([one.input_ids]), one.new_tokens)[0].tolist()
            ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
            ids = ids[: ends[0]] if ends else ids
            said = str(tokenizer.decode(ids, skip_special_tokens=True))
            hits = sum(reference.lower() in said.lower() for reference in one.references)
            assert observed.detail["score"] == hits / len(one.references)
            assert said.startswith(observed.detail["said"])


def test_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], own_words: None) -> None:
    """One command: the mean, its parts, the report, verified and gone on with."""
    model, tokenizer = byte_model(), byte_tokenizer()

    def swept(samples: int) -> Any:
        task = Ruler(only=("vt", "fwe"), samples=samples)
        return sweep(
            model, tokenizer, [task], 2400, methods=["none", "yarn:2"], verify=1,
            results=tmp_path / "results.jsonl", progress=False, overwrite=True,
        )  # fmt: skip

    result = swept(2)
    assert [(check.checked, check.disagreements) for check in result.verified] == [(1, ())] * 2
    print_sweep(result)
    out = " ".join(capsys.readouterr().out.split())
    assert "none 0% vt 0%" in re.sub(r" \d+–\d+|\*", "", out)
    assert "2 tasks of RULER (in words of our own" in out
    assert "qa_1 and qa_2 are left out" in out
    assert "threshold" not in out  # not the thirteen
    assert tmp_path / "parts.csv" in write_sweep(result, tmp_path)
    rows = (tmp_path / "parts.csv").read_text().splitlines()[1:]
    assert [row.split(",")[2] for row in rows] == ["ruler/vt", "ruler/fwe"] * 2
    known = len(result.records)
    assert swept(6).row("none", "ruler", 2400).n == 12
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1 + known + 8


def test_the_mean_of_parts_and_the_threshold() -> None:
    task = Ruler() if SHIPPED else Ruler(only=OWN)
    observed = [
        Observation(64, f"{part}/{i}", f"{part}/{i}", 0.0, 0, detail={"part": part, "score": score})
        for part in task.parts
        for i, score in enumerate((1.0, 1.0, 0.5 if part == "vt" else 1.0))
    ]
    summary = task.summarise(observed)
    count = len(task.parts)
    assert summary.value == pytest.approx(1 - 0.5 / 3 / count)
    assert summary.interval == f"t over {3 * count} clusters in {count} parts, 95%"
    # By hand: each part's three clusters, and one of zeros and one of ones, spread over three.
    spreads = []
    for third in [1.0] * (count - 1) + [0.5]:
        values = [1.0, 1.0, third, 0.0, 1.0]
        mean = sum(values) / 5
        spreads.append(5 / 4 * sum((v - mean) ** 2 for v in values) / 25 * 5 / 3)
    freedom = sum(spreads) ** 2 / sum(v**2 / 4 for v in spreads)
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(sum(spreads)) / count
    assert summary.low == pytest.approx(summary.value - reach)
    assert summary.high == min(1.0, summary.value + reach)
    single = task.summarise([o for o in observed if o.detail["part"] == "niah_single_1"])
    assert (single.value, single.interval) == (1.0, "Wilson 95%")
    if SHIPPED:
        row: Any = type("Row", (), {"method": "none", "length": 4096, "value": 0.9})
        assert "none: above RULER's threshold up to 4,096 tokens" in task.remarks([row])
        row.value = 0.85
        assert "none: above RULER's threshold at none of these lengths" in task.remarks([row])
        assert any("85.6%" in said for said in task.remarks([row]))


def test_what_is_refused(own_words: None) -> None:
    with pytest.raises(DataError, match=r"no task 'niah_singel_1'.*niah_single_1"):
        Ruler(only=("niah_singel_1",))
    with pytest.raises(DataError, match="samples=0"):
        Ruler(samples=0)
    with pytest.raises(DataError, match="name each task once"):
        Ruler(only=("vt", "vt"))
    with pytest.raises(DataError, match=r"qa needs its documents.*pip install"):
        Ruler(only=("qa_1",))
    for part in ("niah_single_1", "vt", "cwe", "fwe"):
        with pytest.raises(DataError, match=rf"length=300 is too short for {part}"):
            question(part, 300)


def test_a_length_that_no_cut_fills_is_named(
    own_words: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_cut(count: object, most: int, target: int) -> None:
        raise DataError(f"no cut fills {target} tokens")

    monkeypatch.setattr("longctx.eval.tasks.ruler.exact_cut", no_cut)
    with pytest.raises(DataError, match=r"^length=3001, niah_single_1: no cut fills \d+ tokens"):
        question("niah_single_1", 3001)


def test_another_release_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruler_source, "_folder", lambda package: tmp_path)
    with pytest.raises(DataError, match=r"constants.py is not there.*26\.3"):
        ruler_source.template("niah")
    path = tmp_path / "data/synthetic/constants.py"
    path.parent.mkdir(parents=True)
    for text in ("TASKS = {", "TASKS = {'niah': {}}", "x = 1", "TASKS = [open('a')]"):
        path.write_text(text)
        with pytest.raises(DataError, match="does not say what RULER's niah asks"):
            ruler_source.template("niah")


@pytest.mark.parametrize("wide", [False, True])
def test_a_cut_is_exact(wide: bool) -> None:
    text = "an é is two bytes, 漢字 are three each, and a full stop is one" * 3

    def count(keep: int, pad: str) -> int:
        return len((text[:keep] + pad).encode()) if wide else len(text[:keep] + pad)

    most = count(len(text), "")
    for target in range(most + 1):
        found = exact_cut(count, len(text), target)
        assert found is not None
        assert count(*found) == target
    assert exact_cut(count, len(text), most + 1) is None
    with pytest.raises(DataError, match="no cut of this text"):
        exact_cut(lambda keep, pad: 3 * keep, 9, 7)


@pytest.mark.slow
@needs_ruler
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
@pytest.mark.filterwarnings("default")
def test_scores_equal_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own prompts, run and scored by it and by us, prompt for prompt."""
    from .harness import check_ruler

    check_ruler(monkeypatch)
