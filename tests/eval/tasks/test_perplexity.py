"""Perplexity against windows that are cut and scored by transformers alone."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import longctx
from longctx.errors import DataError
from longctx.eval import Observation, Perplexity, Unit, sweep
from longctx.eval.tasks.shared.texts import spread
from longctx.prompts.haystacks import held_out

from ..conftest import byte_model, byte_tokenizer

LENGTHS = (200, 400, 800)


def plain_nll(model: Any, ids: list[int]) -> torch.Tensor:
    """NLL in float64 of ids[1:], from the whole logits."""
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return -log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def measured(task: Perplexity, model: Any, tokenizer: Any, invariant: bool) -> list[Observation]:
    plan = task.plan(tokenizer, LENGTHS, length_invariant=invariant)
    return [
        observation
        for unit in plan.units
        for observation in task.measure(
            model, tokenizer, unit, batch_tokens=1000, length_invariant=invariant
        ).observations
    ]


def documents(texts: tuple[str, ...]) -> list[list[int]]:
    files = sorted(Path(texts[0]).iterdir())
    return [byte_tokenizer(bos=False)(file.read_text())["input_ids"] for file in files]


@pytest.mark.parametrize("bos", [True, False])
def test_one_pass_is_every_truncated_window(texts: tuple[str, ...], bos: bool) -> None:
    model, tokenizer = byte_model(), byte_tokenizer(bos=bos)
    task = Perplexity(last=50, windows=3, text=texts)
    found = measured(task, model, tokenizer, True)
    assert len(found) == 9
    for index, ids in enumerate(documents(texts)):
        for length in LENGTHS:
            window = ([1] if bos else []) + ids[: length - int(bos)]
            assert len(window) == length
            nll = plain_nll(model, window)
            observation = next(o for o in found[3 * index : 3 * index + 3] if o.length == length)
            assert observation.nll == pytest.approx(float(nll[-50:].sum()), rel=1e-6)
            assert observation.targets == 50
            assert observation.detail["prefix_nll"] == pytest.approx(float(nll.sum()), rel=1e-6)
            assert observation.detail["prefix_targets"] == length - 1


def test_a_method_that_depends_on_the_length_is_measured_per_length(
    texts: tuple[str, ...], model: Any, tokenizer: Any
) -> None:
    task = Perplexity(last=50, windows=1, text=texts)
    with longctx.extend(model, "dynamic", factor=2.0) as patch:
        assert not patch.method.length_invariant
        found = measured(task, model, tokenizer, False)
        wrong = measured(task, model, tokenizer, True)
        ids = [1, *documents(texts)[0]]
        for observation in found:
            nll = plain_nll(model, ids[: observation.length])[-50:].sum()
            assert observation.nll == pytest.approx(float(nll), rel=1e-6)
    assert abs(wrong[0].nll - found[0].nll) > 1, "one pass would have been wrong"
    assert wrong[-1].nll == pytest.approx(found[-1].nll)


def test_stride_scores_the_same_tokens_at_every_length(
    texts: tuple[str, ...], model: Any, tokenizer: Any
) -> None:
    task = Perplexity(last=60, stride=20, windows=1, text=texts)
    found = measured(task, model, tokenizer, True)
    ids = documents(texts)[0]
    # 799 tokens of the document beside the BOS: the first window of the longest ends there.
    for observation in found:
        total = 0.0
        for end in (799, 819, 839):
            window = [1, *ids[end - observation.length + 1 : end]]
            assert len(window) == observation.length
            total += float(plain_nll(model, window)[-20:].sum())
        assert observation.nll == pytest.approx(total, rel=1e-6)
        assert observation.targets == 60


@pytest.mark.parametrize("stride", [17, 50, 60, 90])
def test_a_stride_need_not_divide(texts: tuple[str, ...], model: Any, stride: int) -> None:
    """The last window ends at the last target, and scores what is left."""
    tokenizer = byte_tokenizer(bos=False)
    task = Perplexity(last=60, stride=stride, windows=1, text=texts)
    ids = documents(texts)[0]
    step = min(stride, 60)
    begin = 800 - step  # the first window of the longest ends at 800
    for observation in measured(task, model, tokenizer, True):
        total, done = 0.0, begin
        while done < begin + 60:
            end = min(done + step, begin + 60)
            window: list[int] = ids[end - observation.length : end]
            total += float(plain_nll(model, window)[done - end :].sum())
            done = end
        assert observation.nll == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("limit", [None, 1024])
def test_sliding_over_whole_documents(
    texts: tuple[str, ...], model: Any, tokenizer: Any, bos: bool | None, limit: int | None
) -> None:
    """The loop of transformers' guide to perplexity, which PI and YaRN print with S = 256."""
    task = Perplexity(last=None, stride=256, limit=limit, bos=bos, windows=2, text=texts)
    found = measured(task, model, tokenizer, True)
    assert len(found) == 6
    before = [] if bos is False else [1]
    for observation, ids in zip(
        found, (d for d in documents(texts)[:2] for _ in LENGTHS), strict=True
    ):
        ids = ids[:limit]
        total, targets, done = 0.0, 0, 0
        size = observation.length - len(before)
        for first in range(0, len(ids), min(256, observation.length - 1)):
            last = min(first + size, len(ids))
            nll = plain_nll(model, [*before, *ids[first:last]])
            total += float(nll[-(last - done) :].sum())
            targets += min(last - done, len(nll))
            done = last
            if last == len(ids):
                break
        assert observation.targets == targets == len(ids) - (not before)
        assert observation.nll == pytest.approx(total, rel=1e-6)
        assert observation.cluster in observation.item


def test_prefix_perplexity_is_that_of_yarns_script(texts: tuple[str, ...], model: Any) -> None:
    """`eval/perplexity.py` of YaRN: a document's first L tokens with a BOS, in one window."""
    tokenizer = byte_tokenizer()
    for last in (50, None):
        task = Perplexity(last=last, windows=1, bos=True, text=texts)
        for observation in measured(task, model, tokenizer, True):
            window = [1, *documents(texts)[0][: observation.length - 1]]
            wanted = math.exp(float(plain_nll(model, window).mean()))
            summary = task.summarise([observation])
            assert summary.prefix == pytest.approx(wanted, rel=1e-6)
            if last is None:
                assert summary.value == pytest.approx(wanted, rel=1e-6)


def test_all_tokens_are_kept_where_windows_slide(
    texts: tuple[str, ...], model: Any, tokenizer: Any
) -> None:
    task = Perplexity(last=None, stride=100, windows=1, text=texts)
    unit = task.plan(tokenizer, (300,), length_invariant=True).units[0]
    found = task.measure(model, tokenizer, unit, batch_tokens=900, length_invariant=True)
    table: Any = found.per_token
    assert table["index"].to_pylist() == list(range(3000))
    assert max(table["context"].to_pylist()) == 299
    assert min(table["context"].to_pylist()[299:]) >= 200
    assert sum(table["nll"].to_pylist()) == pytest.approx(found.observations[0].nll, rel=1e-5)
    assert found.tokens == unit.tokens == 300 * 29 - 1 or found.tokens <= unit.tokens


def test_windows_spread_without_sharing_a_token() -> None:
    places = spread({"a": 3000, "b": 2600, "c": 900, "d": 100}, 800, 5)
    assert places == [("a", 0), ("a", 1500), ("b", 0), ("b", 1300), ("c", 0)]
    assert len(spread({"a": 3000, "b": 2600}, 800, 100)) == 3 + 3
    for name, size in {"a": 3000, "b": 2600}.items():
        starts = [start for n, start in spread({"a": 3000, "b": 2600}, 800, 100) if n == name]
        assert all(b - a >= 800 for a, b in pairwise(starts))
        assert starts[-1] + 800 <= size


def test_documents_left_out_are_said(texts: tuple[str, ...], tokenizer: Any) -> None:
    task = Perplexity(text=texts)
    plan = task.plan(tokenizer, (500, 1500), length_invariant=True)
    assert plan.notes == ("perplexity: 1 of 3 documents are shorter than 1499 tokens and left out",)
    assert [unit.lengths for unit in plan.units] == [(500, 1500)] * 3
    assert sum(unit.tokens for unit in plan.units) == 4500
    assert not task.plan(tokenizer, (500,), length_invariant=True).notes


def test_the_summary_weights_by_tokens_and_exponentiates() -> None:
    task = Perplexity(last=2)
    detail = {"prefix_nll": 6.0, "prefix_targets": 4}
    summary = task.summarise([
        Observation(9, "0", "a", nll=2.0, targets=2, detail=detail),
        Observation(9, "1", "b", nll=4.0, targets=2, detail=detail),
        Observation(9, "2", "c", nll=6.0, targets=2, detail=detail),
    ])  # fmt: skip
    assert summary.value == pytest.approx(math.exp(2))
    assert summary.prefix == pytest.approx(math.exp(1.5))
    # Three documents: mean 2, standard error 1/√3, t(2 df) = 4.303
    assert summary.high == pytest.approx(math.exp(2 + 4.30265 / math.sqrt(3)), rel=1e-4)
    assert summary.low == 1, "no perplexity is below 1"
    assert summary.interval == "t over 3 documents, 95%"
    lone = task.summarise([Observation(9, "0", "a", nll=math.nan, targets=2, detail=detail)])
    assert math.isnan(lone.value)
    assert lone.interval == "none: one document"


def test_what_cannot_be_measured_is_refused(texts: tuple[str, ...], tokenizer: Any) -> None:
    with pytest.raises(DataError, match="stride=0: expected a whole number"):
        Perplexity(stride=0)
    for last, stride in ((128, None), (None, None), (128, 9)):
        with pytest.raises(DataError, match="limit=900 is for whole documents"):
            Perplexity(limit=900, last=last, stride=stride)
    whole = Perplexity(last=None, stride=100, limit=900, text=texts)
    with pytest.raises(DataError, match="limit=900 is below the longest length, 1000"):
        whole.plan(tokenizer, (1000,), length_invariant=True)
    nameless = byte_tokenizer(bos=False)
    nameless.bos_token = None
    with pytest.raises(DataError, match="bos=True, but the tokenizer has no BOS"):
        Perplexity(bos=True, text=texts).plan(nameless, (200,), length_invariant=True)
    with pytest.raises(DataError, match="last=0: expected a whole number"):
        Perplexity(last=0)
    with pytest.raises(DataError, match="128 tokens is too short for last=128 targets"):
        Perplexity().plan(tokenizer, (128, 256), length_invariant=True)
    with pytest.raises(DataError, match="the longest of 3 has 3000"):
        Perplexity(text=texts).plan(tokenizer, (4096,), length_invariant=True)


def test_a_unit_can_be_taken_apart() -> None:
    whole = Unit((100, 200), 200, {"document": "x"})
    assert whole.by_length() == [Unit((100,), 100, whole.spec), Unit((200,), 200, whole.spec)]


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any, list[list[int]]]:
    """The embedded model, and two documents in its tokens."""
    model, tokenizer = longctx.load("demo", device="cpu")
    texts = held_out().documents[:2]
    return model, tokenizer, [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]


def test_the_embedded_models_figure_is_that_of_yarns_script(
    embedded: tuple[Any, Any, list[list[int]]], tmp_path: Path
) -> None:
    """`eval/perplexity.py` of jquesnelle/yarn: texts cut to L − 1 tokens, a BOS before, their mean.

    To seven digits, on several documents as on one.
    """
    model, tokenizer, documents = embedded
    for name, text in zip("ab", held_out().documents, strict=False):
        (tmp_path / f"{name}.txt").write_text(text)
    result = sweep(
        model,
        tokenizer,
        [Perplexity(last=None, bos=True, average="windows", windows=2, text=(str(tmp_path),))],
        (256, 512, 1024),
        progress=False,
    )
    for row in result.rows:
        each: list[float] = []
        for ids in documents:
            batch = torch.tensor([[tokenizer.bos_token_id, *ids[: row.length - 1]]])
            with torch.no_grad():
                logits = model(batch, attention_mask=torch.ones_like(batch)).logits
            losses = torch.nn.functional.cross_entropy(
                logits[0, :-1].double(), batch[0, 1:], reduction="none"
            )
            each.append(math.exp(losses.mean()))
        assert row.value == row.prefix == pytest.approx(sum(each) / 2, rel=1.5e-7)
        assert row.n == 2


def test_the_embedded_models_figure_is_that_of_position_interpolation(
    embedded: tuple[Any, Any, list[list[int]]], tmp_path: Path
) -> None:
    """Chen et al. 2023, section 3.2: Press et al.'s sliding window with S = 256, to seven digits.

    Token by token: each is predicted in the first window that holds it.
    """
    model, tokenizer, documents = embedded
    (tmp_path / "a.txt").write_text(held_out().documents[0])
    length, stride, upto = 512, 256, 1400
    task = Perplexity(last=None, stride=stride, limit=upto, bos=False, text=(str(tmp_path),))
    result = sweep(model, tokenizer, [task], (length,), progress=False)
    ids, logits = documents[0][:upto], dict[int, torch.Tensor]()
    total = 0.0
    for token in range(1, upto):
        first = max(0, -(-(token + 1 - length) // stride)) * stride
        if first not in logits:
            with torch.no_grad():
                window = torch.tensor([ids[first : first + length]])
                logits[first] = model(window).logits[0].double().log_softmax(-1)
        total -= float(logits[first][token - first - 1, ids[token]])
    assert result.rows[0].value == pytest.approx(math.exp(total / (upto - 1)), rel=1.5e-7)
    assert len(logits) == 5


def test_perplexities_are_averaged_if_so_asked() -> None:
    task = Perplexity(last=2, average="windows")
    summary = task.summarise([
        Observation(9, "0", "a", nll=2.0, targets=2, detail={"prefix_nll": 6, "prefix_targets": 4}),
        Observation(9, "1", "b", nll=4.0, targets=2, detail={"prefix_nll": 4, "prefix_targets": 4}),
        Observation(9, "2", "c", nll=2.0, targets=2, detail={"prefix_nll": 6, "prefix_targets": 4}),
    ])  # fmt: skip
    assert summary.value == pytest.approx((2 * math.e + math.e**2) / 3)
    assert summary.prefix == pytest.approx((2 * math.exp(1.5) + math.e) / 3)
    assert summary.low == 1
    assert "mean over windows of exp(mean NLL)" in task.estimand
    assert "average" not in task.cache_key()
    assert task.report_identity()["average"] == "windows"
    assert "average" not in Perplexity().report_identity()
    with pytest.raises(DataError, match="average='all': expected tokens or windows"):
        Perplexity(average="all")  # pyright: ignore[reportArgumentType]
