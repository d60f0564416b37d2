"""Scores against real generation, and what is said where the two differ."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import longctx
from longctx.eval import Passkey, sweep
from longctx.eval.results.verification import Verification
from longctx.eval.running.verify import verify
from longctx.prompts.passkey_prompts import SHORT

from ..conftest import byte_model, byte_tokenizer
from ..retrieval_tasks import generated

TASK = Passkey(samples=12, depths=4, wording=SHORT, digits=3)


@pytest.mark.parametrize("method", ["none", "yarn:2", "alibi", "dynamic:2"])
def test_scores_agree_with_generate(method: str, texts: tuple[str, ...]) -> None:
    task = dataclasses.replace(TASK, text=texts)
    result = sweep(
        byte_model(), byte_tokenizer(), [task], (400, 900), methods=[method], verify=9,
        progress=False,
    )  # fmt: skip
    (check,) = result.verified
    assert (check.checked, check.disagreements) == (9, ())
    said = f"9 answers were generated too, all as scored (passkey under {method})"
    assert said in result.notes


def test_what_is_generated_is_spread_over_lengths_haystacks_and_depths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids: list[tuple[int, ...]] = []

    def nothing(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
        ids.append(tuple(prompt[0].tolist()))
        return prompt[:, :0]

    monkeypatch.setattr("longctx.eval.running.verify.greedy", nothing)
    model, tokenizer = longctx.load("demo")
    sweep(model, tokenizer, ["passkey"], (256, 512), verify=10, progress=False)
    units = Passkey().plan(tokenizer, (256, 512), length_invariant=True).units
    prompts = [p for unit in units for _, _, p in Passkey().cases(tokenizer, unit)]
    asked = [p for p in prompts if p.input_ids[: p.answer_start] in ids]
    assert len(asked) == len(ids) == 10
    assert {(len(p.input_ids), p.haystack.partition("@")[0]) for p in asked} == {
        (length, kind) for length in (256, 512) for kind in ("grass", "python-manual")
    }
    assert len({round(p.depth, 1) for p in asked}) > 4


def test_the_embedded_models_scores_are_what_it_generates() -> None:
    """Some answers right, some wrong; 80 of them in all, half with shared prefixes."""
    model, tokenizer = longctx.load("demo")
    methods = ["none", "linear:2", "yarn:4", "alibi"]
    task = Passkey(samples=30)
    result = sweep(model, tokenizer, [task], (256, 512), methods=methods, verify=20, progress=False)
    assert [check.checked for check in result.verified] == [20] * 4
    assert not [told for check in result.verified for told in check.disagreements]
    hits = [o.correct for record in result.records for o in record.observations]
    assert 30 < sum(map(bool, hits)) < 210


def test_a_disagreement_is_told(texts: tuple[str, ...]) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    task = dataclasses.replace(TASK, text=texts)
    result = sweep(model, tokenizer, [task], (400,), progress=False)
    units = task.plan(tokenizer, (400,), length_invariant=True).units
    (record,) = result.records
    first, *others = record.observations
    assert first.correct is False
    said = first.detail["argmax_ids"]

    def checked(detail: dict[str, Any], **how: Any) -> Verification:
        changed = dataclasses.replace(first, detail=detail, **how)
        lying = dataclasses.replace(record, observations=(changed, *others))
        return verify(model, tokenizer, "none", task, units, [lying], 100)

    check = checked({"argmax_ids": [said[0] + 1, *said[1:]]})
    assert check.checked == 12
    (told,) = check.disagreements
    assert told.startswith("prompt 0 at 400: scored '"), "wrong in both, yet not the same"
    assert "1 NOT as scored: prompt 0" in check.note
    assert not checked({"argmax_ids": [*said[:-1], said[-1] + 1]}).disagreements, (
        "after a miss the two go on from different texts"
    )
    check = checked({}, correct=None, nll=float("nan"))
    assert (check.checked, check.disagreements) == (11, ()), "NaN is not an answer to be checked"
    alone = dataclasses.replace(record, observations=())
    note = verify(model, tokenizer, "none", task, units, [alone], 100).note
    assert note == "passkey under none: no answer could be checked: no answer has a score"


def test_no_memory_to_generate_costs_no_report(
    texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("longctx.eval.running.verify.greedy", full)
    task = dataclasses.replace(TASK, text=texts)
    found = sweep(byte_model(), byte_tokenizer(), [task], (400,), verify=2, progress=False)
    (check,) = found.verified
    assert (check.checked, len(check.lost)) == (0, 2)
    assert f"no memory to generate after {check.lost[0]}, {check.lost[1]}" in check.note
    assert check.note in found.notes
    assert all(not row.failed for row in found.rows)


def test_settings_of_the_checkpoint_do_not_reach_generation(texts: tuple[str, ...]) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    task = dataclasses.replace(TASK, text=texts)
    (unit,) = task.plan(tokenizer, (400,), length_invariant=True).units
    prompts = [prompt for _, _, prompt in task.cases(tokenizer, unit)]
    plain = [generated(model, prompt) for prompt in prompts]
    assert {len(answer) for answer in plain} == {len(prompts[0].answer_ids)}
    settings: Any = model.generation_config
    settings.repetition_penalty, settings.no_repeat_ngram_size = 5.0, 1
    settings.do_sample, settings.temperature, settings.num_beams = True, 9.0, 3
    settings.suppress_tokens, settings.bad_words_ids = [plain[0][0]], [[plain[1][0]]]
    assert [generated(model, prompt) for prompt in prompts] == plain
    assert longctx.patch_of(model) is None
