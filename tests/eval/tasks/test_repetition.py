"""Generated continuations against a loop over whole forward passes, and the sampling against p."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import longctx
from longctx.errors import DataError, RunError
from longctx.eval import Observation, Task, Unit, sweep
from longctx.eval.reporting.files import write_sweep
from longctx.eval.reporting.tables import print_sweep
from longctx.eval.tasks.repetition import Repetition
from longctx.generation.generate import generate

from ..conftest import byte_model, byte_tokenizer

LENGTHS = (100, 300)
DRAWN = "sample:temperature=0.9,top_p=0.8"


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The argmax of the last logits, again and again, without a cache."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def naive_share(tokens: list[int], n: int) -> float:
    """Share of n-grams that stood before, each looked for among those before it."""
    grams = [tokens[i : i + n] for i in range(len(tokens) - n + 1)]
    return sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams)


def measured(
    task: Repetition, model: Any, tokenizer: Any, batch_tokens: int = 10_000
) -> list[Observation]:
    plan = task.plan(tokenizer, LENGTHS, length_invariant=True)
    return [
        observation
        for unit in plan.units
        for observation in task.measure(
            model, tokenizer, unit, batch_tokens=batch_tokens, length_invariant=True
        ).observations
    ]


def documents(texts: tuple[str, ...]) -> list[list[int]]:
    files = sorted(Path(texts[0]).iterdir())
    return [byte_tokenizer(bos=False)(file.read_text())["input_ids"] for file in files]


@pytest.mark.parametrize("bos", [True, False])
def test_greedy_is_the_argmax_again_and_again(texts: tuple[str, ...], bos: bool) -> None:
    model, tokenizer = byte_model(), byte_tokenizer(bos=bos)
    found = measured(Repetition(new_tokens=20, ignore_eos=True, text=texts), model, tokenizer)
    by_end = {o.item: o for o in found if o.length == 300}
    assert len({o.cluster for o in found}) == 3
    assert len(found) == 2 * len(by_end)
    for observation in found:
        end = observation.detail["end"]
        ids = documents(texts)[sorted({o.cluster for o in found}, key=order(found)).index(
            observation.cluster
        )]  # fmt: skip
        prompt = [1] * bos + ids[end - observation.length + bos : end]
        assert len(prompt) == observation.length
        said = greedy(model, prompt, 20)
        assert observation.detail["text"] == tokenizer.decode(said)
        assert observation.detail["tokens"] == 20
        assert observation.detail["uniq"] == len(set(said))
        for n in (1, 2, 3, 4):
            assert observation.detail[f"seq_rep_{n}"] == pytest.approx(naive_share(said, n))
        follows = ids[end : end + 20]
        assert observation.detail["text_seq_rep_4"] == pytest.approx(naive_share(follows, 4))
        assert (observation.correct, observation.targets, observation.nll) == (None, 0, 0.0)


def order(found: list[Observation]) -> Any:
    """Documents come in the order of their files."""
    return [o.cluster for o in found].index


def test_a_batch_does_not_change_what_is_drawn(texts: tuple[str, ...]) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    task = Repetition(new_tokens=12, windows=4, decoding=DRAWN, seed=3, text=texts)
    state = torch.get_rng_state()
    alone, together = (measured(task, model, tokenizer, n) for n in (1, 10_000))
    assert [o.detail for o in alone] == [o.detail for o in together]
    assert torch.equal(state, torch.get_rng_state()), "nobody else's draws are taken"
    assert alone[0].detail["seed"] == 3
    other = Repetition(new_tokens=12, windows=4, decoding=DRAWN, seed=4, text=texts)
    assert [o.detail["text"] for o in measured(other, model, tokenizer)] != [
        o.detail["text"] for o in alone
    ]


def test_decodings_are_those_of_generate(texts: tuple[str, ...]) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    for decoding in ("dry", "beam:num_beams=2", "contrastive", "sample:temperature=0.7,top_p=0.9"):
        task = Repetition(new_tokens=12, windows=3, decoding=decoding, seed=2, text=texts)
        found = [o for o in measured(task, model, tokenizer) if o.length == 100]
        names = order(found)
        clusters = sorted({o.cluster for o in found}, key=names)
        prompts = [
            [
                1,
                *documents(texts)[clusters.index(o.cluster)][
                    o.detail["end"] - 99 : o.detail["end"]
                ],
            ]
            for o in found
        ]
        said = generate(
            model, tokenizer, prompts, decoding=decoding, seed=2, max_new_tokens=12, ignore_eos=True
        )
        assert [o.detail["text"] for o in found] == [
            tokenizer.decode(list(ids)) for ids in said.token_ids
        ]
        assert decoding.partition(":")[0] in task.estimand.lower()


def test_greedy_results_of_before_there_were_decodings_are_gone_on_with(
    texts: tuple[str, ...],
) -> None:
    known = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "ignore_eos": True, "windows": 10}
    assert "decoding" in Repetition(text=texts, decoding="sample").cache_key()
    key = Repetition(text=texts).cache_key()
    assert {name: key[name] for name in known} == known
    assert "greedy continuations of 256 tokens after real" in Repetition(text=texts).estimand


def test_beyond_the_window_it_goes_on(texts: tuple[str, ...]) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    model.config.max_position_embeddings = 128
    assert len(measured(Repetition(new_tokens=8, windows=2, text=texts), model, tokenizer)) == 4


def test_it_stops_before_the_end_of_text(texts: tuple[str, ...]) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    free = Repetition(new_tokens=20, windows=3, text=texts)
    full = measured(free, model, tokenizer)
    end = full[0].detail["end"]
    said = greedy(model, [1, *documents(texts)[0][end - LENGTHS[0] + 1 : end]], 20)
    assert tokenizer.decode(said) == full[0].detail["text"]
    # Any token may be the end; the checkpoint may name several, and other settings that must not
    # matter.
    model.generation_config = GenerationConfig(
        eos_token_id=[7, said[5]], repetition_penalty=9.0, suppress_tokens=list(range(3, 200))
    )
    stopping = Repetition(new_tokens=20, windows=3, text=texts, ignore_eos=False)
    found = measured(stopping, model, tokenizer)
    first = next(i for i, token in enumerate(said) if token in (2, 7, said[5]))  # 2: tokenizer's
    assert found[0].detail["tokens"] == first
    assert found[0].detail["stopped"] == "eos"
    assert found[0].detail["text"] == tokenizer.decode(said[:first])
    assert [o.detail for o in measured(free, model, tokenizer)] == [o.detail for o in full]
    assert model.generation_config.repetition_penalty == 9.0


def test_the_loop_of_a_model_that_always_says_the_same(texts: tuple[str, ...]) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    task = Repetition(new_tokens=30, text=texts, ignore_eos=True)
    found = measured(task, model, tokenizer)
    detail = found[0].detail
    assert detail["seq_rep_4"] == pytest.approx(26 / 27)
    assert detail["loop_onset"] == 0
    assert detail["uniq"] == 1
    assert detail["rep_128"] == pytest.approx(29 / 30)
    summary = task.summarise(found)
    assert summary.value == pytest.approx(26 / 27)
    assert summary.interval == "none: all alike"


def test_nan_logits_fail_the_cell(texts: tuple[str, ...], tokenizer: Any) -> None:
    model = byte_model()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    for decoding in ("greedy", "sample"):
        task = Repetition(new_tokens=4, text=texts, decoding=decoding)
        result = sweep(model, tokenizer, [task], LENGTHS, progress=False)
        assert all("NaN" in str(row.failed) and math.isnan(row.value) for row in result.rows)


def test_the_summary_by_hand() -> None:
    def observation(cluster: str, share: float) -> Observation:
        return Observation(9, cluster, cluster, 0.0, 0, detail={"seq_rep_4": share})

    task = Repetition()
    two = [observation("a", 0.2), observation("b", 0.4)]
    summary = task.summarise([*two, observation("c", 0.6)])
    assert summary.value == pytest.approx(0.4)
    assert summary.low == 0.0
    assert summary.high == pytest.approx(0.4 + 4.30265 * 0.2 / math.sqrt(3))
    assert summary.interval == "t over 3 documents, 95%"
    assert task.summarise(two).interval == "none: two documents, and an interval takes three"
    assert task.summarise([observation("a", 0.2)]).interval == "none: one document"
    assert math.isnan(task.summarise([]).value)


def test_a_sweep_shows_a_share_and_resumes(
    texts: tuple[str, ...], tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Repetition(new_tokens=8, windows=3, text=texts)
    assert isinstance(task, Task)
    ask: dict[str, Any] = {
        "methods": ["none", "yarn:2"],
        "results": tmp_path / "results.jsonl",
        "progress": False,
    }
    result = sweep(byte_model(), tokenizer, [task], LENGTHS, **ask)
    print_sweep(result)
    assert "%" in capsys.readouterr().out
    assert (tmp_path / "sweep.png") in write_sweep(result, tmp_path)
    again = sweep(byte_model(), tokenizer, [task], LENGTHS, **ask)
    assert repr(again.rows) == repr(result.rows)  # NaN is equal to itself in text alone
    detail = again.records[0].observations[0].detail
    assert "loop_onset" not in detail or isinstance(detail["loop_onset"], int)
    with longctx.extend(byte_model(), "dynamic", factor=2.0) as patch:
        assert measured(task, patch.model, tokenizer)


def test_documents_left_out_and_prompts_of_one_end(texts: tuple[str, ...], tokenizer: Any) -> None:
    task = Repetition(new_tokens=50, text=texts)
    plan = task.plan(tokenizer, (500, 900), length_invariant=False)
    assert plan.notes == ("repetition: 1 of 3 documents, below 949 tokens, are left out",)
    assert [unit.lengths for unit in plan.units] == [(500,), (900,)]
    assert plan.units[0].spec == plan.units[1].spec
    ends = [end for _, end in plan.units[0].spec["windows"]]
    assert ends == [899, 899 + 1000, 899 + 2000, 899, 899 + 1300]
    assert plan.units[1].tokens == 950 * 5
    assert isinstance(plan.units[0], Unit)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"new_tokens": 3}, "new_tokens=3"),
        ({"windows": 0}, "windows=0"),
        ({"decoding": "greddy"}, "did you mean"),
        ({"decoding": "sample:temperature=-1.0"}, "temperature=-1.0"),
        ({"decoding": "sample:temperature=0,top_p=0.9"}, "no effect"),
    ],
)
def test_settings_that_mean_nothing(fields: dict[str, Any], said: str) -> None:
    with pytest.raises((DataError, RunError), match=said):
        Repetition(**fields)


def test_texts_that_are_too_short(texts: tuple[str, ...], tokenizer: Any) -> None:
    with pytest.raises(DataError, match="the longest of 3 has 3000"):
        Repetition(text=texts).plan(tokenizer, (2800,), length_invariant=True)
    with pytest.raises(DataError, match="no room for text"):
        Repetition(text=texts).plan(tokenizer, (1,), length_invariant=True)
