"""Passkey cells against `generate`, and the prompts behind them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from longctx.errors import DataError
from longctx.eval import Observation, Passkey
from longctx.eval.stats.intervals import wilson
from longctx.prompts.passkey_prompts import SHORT, Prompt, split_of

from ..conftest import byte_model, byte_tokenizer

LENGTH = 400
TASK = Passkey(samples=6, haystack="grass", wording=SHORT)


def observe(task: Passkey, model: Any, length: int = LENGTH, batch: int = 900) -> Any:
    unit = task.part(length, range(task.samples), length)
    return task.measure(
        model, byte_tokenizer(), unit, batch_tokens=batch, length_invariant=True
    ).observations


def prompts_of(task: Passkey, length: int = LENGTH) -> list[Prompt]:
    unit = task.part(length, range(task.samples), length)
    return [prompt for _, _, prompt in task.cases(byte_tokenizer(), unit)]


@pytest.fixture(scope="module")
def knowing() -> Any:
    """A model that answers with the first prompt's key, whatever it is asked."""
    model = byte_model()
    prompt = prompts_of(TASK)[0]
    ids = torch.tensor([prompt.input_ids])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        logits = model(ids).logits[0, prompt.answer_start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, prompt.answer_start :])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_found_is_what_generate_returns(knowing: Any) -> None:
    tokenizer = byte_tokenizer()
    found = observe(TASK, knowing)
    for prompt, observation in zip(prompts_of(TASK), found, strict=True):
        asked = torch.tensor([prompt.input_ids[: prompt.answer_start]])
        out = knowing.generate(
            asked, max_new_tokens=len(prompt.answer_ids), do_sample=False, eos_token_id=None
        )
        answer = str(tokenizer.decode(out[0, prompt.answer_start :]))
        assert observation.correct == (answer.strip() == prompt.key)
        if observation.correct:
            assert observation.detail["argmax"] == answer
        with torch.no_grad():
            log_p = knowing(torch.tensor([prompt.input_ids])).logits[0].double().log_softmax(-1)
        places = torch.arange(prompt.answer_start, LENGTH)
        nll = -log_p[places - 1, torch.tensor(prompt.answer_ids)].sum()
        assert observation.nll == pytest.approx(float(nll), rel=1e-4)
        assert observation.targets == len(prompt.answer_ids)
    assert [o.correct for o in found] == [True] + [False] * 5


def test_prompts_have_the_exact_length_and_depths_of_the_grid(texts: tuple[str, ...]) -> None:
    task = Passkey(samples=12, depths=3, haystack="both", text=texts, wording=SHORT)
    prompts = prompts_of(task, 3000)
    assert {len(prompt.input_ids) for prompt in prompts} == {3000}
    assert len({prompt.key for prompt in prompts}) == 12
    assert {split_of(prompt.key) for prompt in prompts} == {"eval"}
    grass, real = prompts[::2], prompts[1::2]
    for kind in (grass, real):
        assert sorted(p.depth for p in kind) == pytest.approx([0, 0, 0.5, 0.5, 1, 1], abs=0.05)
    assert {prompt.haystack for prompt in grass} == {"grass"}
    assert len({prompt.haystack for prompt in real}) > 1


@pytest.mark.parametrize(
    ("settings", "depths"),
    [
        ({"samples": 3, "haystack": "grass"}, [0.0, 0.5, 1.0]),
        ({"samples": 1, "haystack": "grass"}, [0.5]),
        ({"samples": 4, "haystack": "both"}, [0.25, 0.75]),
        ({"samples": 40, "haystack": "both", "depths": 5}, [0.0, 0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_few_samples_still_reach_from_end_to_end(
    settings: dict[str, Any], depths: list[float]
) -> None:
    assert Passkey(**settings)._grid() == depths  # pyright: ignore[reportPrivateUsage]


def test_lengths_draw_their_own_keys_and_haystacks_unless_they_share(
    texts: tuple[str, ...],
) -> None:
    task = Passkey(samples=8, haystack="text", text=texts, wording=SHORT)
    short, long = prompts_of(task, 500), prompts_of(task, 600)
    assert not {p.key for p in short} & {p.key for p in long}
    assert not {p.haystack for p in short} & {p.haystack for p in long}
    task = dataclasses.replace(task, share_lengths=True)
    units = [task.part(length, range(8), 600) for length in (500, 600)]
    short, long = ([p for *_, p in task.cases(byte_tokenizer(), unit)] for unit in units)
    assert [(p.key, p.haystack) for p in short] == [(p.key, p.haystack) for p in long]


@pytest.mark.parametrize(
    ("samples", "depths", "haystacks"), [(10, 10, 5), (20, 10, 6), (50, 10, 5), (3, 3, 3)]
)
def test_real_text_comes_from_several_places(
    samples: int, depths: int, haystacks: int, texts: tuple[str, ...]
) -> None:
    task = Passkey(samples=samples, depths=depths, haystack="text", text=texts, wording=SHORT)
    specs = [task.prompt_spec(index, LENGTH, None) for index in range(samples)]
    assert len({spec.haystack_seed for spec in specs}) == haystacks
    assert len({(spec.haystack_seed, spec.depth) for spec in specs}) == samples


@pytest.mark.parametrize(
    ("clusters", "name"),
    [
        (["a"] * 4, "Wilson 95%, as if its 4 prompts in 1 cluster were independent"),
        (["a", "a", "b", "b"], "Wilson 95%, as if its 4 prompts in 2 clusters were independent"),
        (["a", "a", "b", "c"], "Wilson 95%, with the design effect of 4 prompts in 3 clusters"),
        (["a", "b", "c", "d"], "Wilson 95%"),
    ],
)
def test_the_interval_says_what_hangs_together(clusters: list[str], name: str) -> None:
    found = [Observation(LENGTH, str(i), c, 0.0, 1, i % 2 == 0) for i, c in enumerate(clusters)]
    summary = TASK.summarise(found)
    assert (summary.value, summary.interval) == (0.5, name)


def test_prompts_of_a_stretch_that_differs_from_others_widen_the_interval() -> None:
    grass = [Observation(LENGTH, f"g{i}", f"grass/{i}", 0.0, 1, True) for i in range(50)]
    shares = {"a": 10, "b": 9, "c": 4, "d": 3, "e": 8}
    text = [
        Observation(LENGTH, f"{name}{i}", name, 0.0, 1, i < hits)
        for name, hits in shares.items()
        for i in range(10)
    ]
    summary = TASK.summarise([*grass, *text])
    low, high = wilson(84, 100)
    assert summary.value == pytest.approx(0.84)
    assert summary.low < low - 0.05
    assert summary.high > high + 0.02


def test_random_depths_differ_and_are_the_same_again(model: Any) -> None:
    task = Passkey(samples=5, depths=None, haystack="grass", wording=SHORT)
    first, again = observe(task, model), observe(task, model)
    assert first == again
    assert len({o.detail["depth"] for o in first}) > 2
    other = observe(dataclasses.replace(task, seed=1), model)
    assert not {o.detail["key"] for o in first} & {o.detail["key"] for o in other}


def test_the_batch_does_not_matter(model: Any) -> None:
    whole, single = observe(TASK, model, batch=10**6), observe(TASK, model, batch=1)
    assert [o.correct for o in whole] == [o.correct for o in single]
    assert [o.nll for o in whole] == pytest.approx([o.nll for o in single], rel=1e-5)


def test_nan_is_neither_right_nor_wrong(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[9] = torch.nan
    found = observe(TASK, model)
    assert {o.correct for o in found} == {None}
    assert all(math.isnan(o.nll) for o in found)
    assert math.isnan(TASK.summarise(found).value)


def test_the_summary_is_a_share_with_wilson() -> None:
    answers = [Observation(64, str(index), "x", 1.0, 5, index < 15) for index in range(20)]
    summary = TASK.summarise(answers)
    assert summary.value == 0.75
    assert (summary.low, summary.high) == pytest.approx((0.5313, 0.8881), abs=1e-4)


def test_the_plan_fails_early_and_the_spec_follows_the_text(
    texts: tuple[str, ...], tokenizer: Any
) -> None:
    plan = TASK.plan(tokenizer, (LENGTH, 800), length_invariant=True)
    assert [(unit.lengths, unit.tokens) for unit in plan.units] == [((400,), 2400), ((800,), 4800)]
    with pytest.raises(DataError, match=r"length=100 is too short for .* a longer one\.$"):
        TASK.plan(tokenizer, (100, 800), length_invariant=True)
    with pytest.raises(DataError, match=r"or in Python shorter sentences \(wording=SHORT\)"):
        Passkey(haystack="grass").plan(tokenizer, (100, 800), length_invariant=True)
    real = Passkey(haystack="text", text=texts, wording=SHORT)
    with pytest.raises(DataError, match="has 6504 tokens, the prompt needs 19955"):
        real.plan(tokenizer, (400, 20_000), length_invariant=True)
    assert real.cache_key() != Passkey(haystack="text", wording=SHORT).cache_key()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples=0: expected 1 to"),
        ({"depths": 0}, "depths=0: expected at least one, or None"),
        ({"haystack": "hay"}, "haystack='hay': expected 'grass', 'text' or 'both'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Passkey(**settings)
