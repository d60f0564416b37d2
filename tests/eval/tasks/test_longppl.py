"""LongPPL against its equations, a token at a time, with the evaluator's tokenizer or another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import longctx
from longctx.errors import DataError, ModelError, RunError
from longctx.eval import LongPpl, Observation, SweepResult, compare, sweep
from longctx.eval.tasks.shared import key_tokens
from longctx.eval.tasks.shared.key_tokens import Alignment, KeyRule, offsets_of
from longctx.eval.tasks.shared.texts import digest, texts_of

from ..conftest import byte_model, byte_tokenizer

LENGTHS = (80, 160)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """No evaluator stays loaded from one test to the next."""
    yield
    key_tokens.evaluator_of.cache_clear()


@pytest.fixture
def evaluator(tmp_path: Path) -> str:
    """A folder with another model of bytes, whose tokenizer puts a BOS before a text."""
    path = tmp_path / "evaluator"
    byte_model(seed=1).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def nll_of(model: Any, ids: list[int]) -> list[float]:
    """NLL in float64 of ids[1:], from the whole logits."""
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return (-log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]).tolist()


def naive_keys(model: Any, ids: list[int], bos: list[int], rule: KeyRule) -> list[int]:
    """Equation 6, every short context a text of its own."""
    found: list[int] = []
    whole = nll_of(model, [*bos, *ids])
    for i in range(rule.short, len(ids)):
        first = (i - rule.short) // rule.step * rule.step
        long = -whole[i + len(bos) - 1]
        short = -nll_of(model, [*bos, *ids[first : i + 1]])[-1]
        if long - short > rule.alpha and long > rule.beta:
            found.append(i)
    return found


def observed(result: SweepResult, method: str = "none") -> list[Observation]:
    return [o for r in result.records if r.method == method for o in r.observations]


@pytest.mark.parametrize("bos", [None, False])
def test_keys_and_figure_are_the_papers(
    texts: tuple[str, ...], evaluator: str, bos: bool | None
) -> None:
    """With bos=False this is what the authors' code computes for one text."""
    task = LongPpl(
        evaluator, short=20, step=8, alpha=0.2, beta=-6.0, windows=3, bos=bos, text=texts
    )
    model, tokenizer = byte_model(), byte_tokenizer()
    result = sweep(model, tokenizer, [task], LENGTHS, methods=["none", "yarn:2"], progress=False)
    other, _ = longctx.load(evaluator)
    before = [] if bos is False else [1]
    files = sorted(Path(texts[0]).iterdir())[:3]
    sums: dict[int, tuple[float, int]] = dict.fromkeys(LENGTHS, (0.0, 0))
    for file in files:
        ids = byte_tokenizer(bos=False)(file.read_text())["input_ids"][: 160 - len(before)]
        keys = naive_keys(other, ids, before, KeyRule(20, 8, 0.2, -6.0))
        nll = nll_of(model, [*before, *ids])
        for one in observed(result):
            if one.cluster != digest(file.read_text()):
                continue
            wanted = [key for key in keys if key + len(before) < one.length]
            assert one.detail["keys"] == wanted
            assert one.targets == len(wanted) > 3
            total = sum(nll[key + len(before) - 1] for key in wanted)
            assert one.nll == pytest.approx(total, rel=1e-5)
            sums[one.length] = sums[one.length][0] + total, sums[one.length][1] + len(wanted)
            assert one.detail["prefix_nll"] == pytest.approx(sum(nll[: one.length - 1]), rel=1e-5)
    for length, (total, count) in sums.items():
        row = result.row("none", "longppl", length)
        assert row.value == pytest.approx(math.exp(total / count), rel=1e-5)
        assert row.targets == count == result.row("yarn:2", "longppl", length).targets
        assert row.low < row.value < row.high
        assert row.interval == "t over 3 documents, 95%"
    rows = [row for row in result.rows if row.method == "none"]
    counts = ", ".join(f"{row.targets} before {row.length}" for row in rows)
    assert task.remarks(result.rows) == [f"key tokens: {counts}"]
    assert compare({"sweep": result}).rows[-1].paired == 3


def test_another_tokenizer_goes_by_characters(texts: tuple[str, ...]) -> None:
    """As the authors' code: what lies within the characters of the evaluator's key tokens."""
    task = LongPpl("demo", short=24, step=8, alpha=0.5, beta=-5.0, windows=1, text=texts)
    model, tokenizer = byte_model(), byte_tokenizer()
    result = sweep(model, tokenizer, [task], (300,), progress=False)
    demo, theirs = longctx.load("demo")
    own: list[Any] = [theirs.bos_token_id] if theirs("")["input_ids"] else []
    found = observed(result)
    assert sum(one.targets for one in found) > 3
    by_digest = {digest(text): text for text in texts_of(texts).documents}
    for one in found:
        text = by_digest[one.cluster][one.detail["start"] :][:299]  # a byte a token, behind a BOS
        spans: Any = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        keys = naive_keys(demo, spans["input_ids"], own, KeyRule(24, 8, 0.5, -5.0))
        within: set[int] = set()
        for key in keys:
            within |= set(range(*spans["offset_mapping"][key]))
        spaces = {i for i, letter in enumerate(text) if letter.isspace()}
        assert within - spaces <= set(one.detail["keys"]) <= within | spaces


def test_without_an_evaluator_each_method_chooses_for_itself(texts: tuple[str, ...]) -> None:
    task = LongPpl(short=20, alpha=0.2, beta=-6.0, windows=2, text=texts)
    model = byte_model()
    result = sweep(
        model, byte_tokenizer(), [task], (160,), methods=["none", "yarn:8"], progress=False
    )
    one, two = observed(result), observed(result, "yarn:8")
    assert [o.detail["keys"] for o in one] != [o.detail["keys"] for o in two]
    ids = byte_tokenizer(bos=False)(texts_of(texts).documents[0])["input_ids"][:159]
    rule = KeyRule(20, 5, 0.2, -6.0)
    assert one[0].detail["keys"] == naive_keys(model, ids, [1], rule)
    assert "so that each has tokens of its own" in task.estimand
    assert len(task.remarks(result.rows)) == 2
    with pytest.raises(RunError, match="no prompt or window in common"):
        compare({"sweep": result})


def test_a_method_that_depends_on_the_length_is_measured_per_length(
    texts: tuple[str, ...], evaluator: str
) -> None:
    task = LongPpl(evaluator, short=40, alpha=0.2, beta=-6.0, windows=1, text=texts)
    result = sweep(
        byte_model(), byte_tokenizer(), [task], (300, 700), methods=["none", "dynamic:2"],
        progress=False,
    )  # fmt: skip
    for one, two in zip(observed(result), observed(result, "dynamic:2"), strict=True):
        assert one.detail["keys"] == two.detail["keys"], "keys are those of the text"
        assert one.item == two.item
        # Within the window `dynamic` changes nothing; beyond it does.
        assert (one.nll == pytest.approx(two.nll, rel=1e-5)) == (one.length == 300)
    longest = [n for n in result.notes if "claims 512 tokens and reads 699" in n]
    assert longest, result.notes


def test_tokens_lie_within_keys_by_their_characters() -> None:
    text = "the key is 512, ok"
    evaluator = ((0, 3), (3, 7), (7, 10), (10, 14), (14, 15), (15, 18))

    def within(keys: list[int], *model: tuple[int, int]) -> list[int]:
        return Alignment(text, evaluator, model).within(keys)

    assert within([1], (0, 3), (4, 7), (7, 10)) == [1]  # without the space before it
    assert within([1], (0, 3), (3, 7), (7, 10)) == [1]  # with it
    assert within([3], (11, 12), (12, 13), (13, 14), (14, 15)) == [0, 1, 2]  # digit by digit
    assert within([3], (10, 15)) == []  # more than the key
    assert within([3, 4], (10, 15)) == [0]  # two keys in a row
    assert within([2, 4], (7, 15)) == []  # two that are not
    assert within([0, 5], (2, 2), (3, 4), (16, 18)) == [2]  # nothing, a space, a word
    assert within([], (0, 3)) == []


def test_windows_cover_every_candidate_once() -> None:
    for short, step, tokens in ((4, 3, 14), (4, 4, 12), (5, 9, 7), (6, 2, 6)):
        windows = KeyRule(short, step, 2.0, -2.0).windows(tokens)
        scored = [i for _, last, new in windows for i in range(last - new, last)]
        assert scored == list(range(short, tokens))
        for first, last, new in windows:
            assert short < last - first <= short + step
            assert last - first == short + new


def test_no_key_is_no_figure(texts: tuple[str, ...]) -> None:
    task = LongPpl(short=40, alpha=99.0, windows=1, text=texts)
    result = sweep(byte_model(), byte_tokenizer(), [task], (300,), progress=False)
    row = result.rows[0]
    assert math.isnan(row.value)
    assert row.failed is None
    assert row.interval == "none: no key token"
    assert row.prefix is not None
    assert row.prefix > 1
    assert task.remarks(result.rows) == ["key tokens: 0 before 300"]
    with pytest.raises(RunError, match="nothing in common"):
        compare({"one": result, "two": result})


def test_settings_that_cannot_be(texts: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    for fields, said in (
        ({"short": 0}, "short=0: expected a whole number"),
        ({"step": 0}, "step=0: expected a whole number"),
        ({"windows": 0}, "windows=0: expected a whole number"),
        ({"alpha": math.nan}, "alpha=nan: expected a finite number"),
        ({"evaluator_method": "yarn:2"}, "is for an evaluator: name one"),
    ):
        with pytest.raises(DataError, match=said):
            LongPpl(**fields)  # pyright: ignore[reportArgumentType]
    assert LongPpl(evaluator_method="none").cache_key()["evaluator"] is None
    assert LongPpl().cache_key()["step"] == 1024
    with pytest.raises(DataError, match="no token with more than short=4,096 before it"):
        LongPpl(text=texts).plan(tokenizer, (4096,), length_invariant=True)
    with pytest.raises(DataError, match=r"are \d+ of the evaluator demo, no more than short=399"):
        LongPpl("demo", short=399, text=texts).plan(tokenizer, (401,), length_invariant=True)
    with pytest.raises(ModelError, match="nothere"):
        LongPpl(str(tmp_path / "nothere"), short=9, text=texts).plan(
            tokenizer, (300,), length_invariant=True
        )


def test_a_tokenizer_without_characters_is_refused() -> None:
    class Slow:
        is_fast = False

    slow: Any = Slow()
    with pytest.raises(DataError, match=r"that of the model \(Slow\) does not say which"):
        offsets_of(slow, "a", "model")


def test_the_evaluators_method_is_part_of_the_key(evaluator: str) -> None:
    keys = [
        LongPpl(evaluator, evaluator_method=method).cache_key()["evaluator"]
        for method in ("none", "yarn:2")
    ]
    assert keys[0] != keys[1]
    assert keys[0][1] == keys[1][1]
    assert "under yarn:2 finds" in LongPpl(evaluator, evaluator_method="yarn:2").estimand
