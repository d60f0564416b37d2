"""LongEval's lines: generated ones."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import longctx
from longctx.errors import DataError
from longctx.eval import Lines, sweep
from longctx.prompts.passkey_prompts import split_of
from longctx.scoring.continuations import Continuations
from longctx.scoring.greedy import greedy

from ..conftest import byte_model, byte_tokenizer
from ..retrieval_tasks import check_properties, check_too_short, prompts_of, shared, text_of

LINE = re.compile(r"^line ([a-z-]+): REGISTER_CONTENT is <(\d{5})>$", re.MULTILINE)


def test_properties() -> None:
    check_properties(Lines(samples=4, depths=2), 2000)
    check_too_short(Lines())


def test_a_reader_can_answer() -> None:
    prompts = prompts_of(Lines(samples=10), 4000)
    assert [p.key for p in prompts[:2]] == ["25832", "47015"], "golden: recorded results hang on it"
    for prompt in prompts:
        text = text_of(prompt)
        record, _, question = text.partition("\n\nNow the record is over.")
        lines = dict(LINE.findall(record))
        assert len(lines) > 50
        assert len(LINE.findall(record)) == record.count("\n") - 1, "no line is cut"
        asked = question.partition("in line ")[2].partition("?")[0]
        assert prompt.key == lines[asked]
        assert question.endswith(f"The <REGISTER_CONTENT> in line {asked} is <{prompt.key}")
        assert {split_of(word) for pair in lines.items() for word in pair} == {"eval"}
    depths = [prompt.depth for prompt in prompts]
    assert depths == pytest.approx([i / 9 for i in range(10)], abs=0.03)
    assert (depths[0], depths[-1]) == (0, 1)


def test_prompts_of_one_record_share_all_but_its_end() -> None:
    prompts = prompts_of(Lines(samples=10), 4000)
    assert min(shared(prompts[0], prompt) for prompt in prompts[1:]) > 2800
    assert len({prompt.haystack for prompt in prompts}) == 1
    random = prompts_of(Lines(samples=4, depths=None), 2000)
    assert len({prompt.haystack for prompt in random}) == 4


def test_lengths_share_records_when_told() -> None:
    def first(share: bool, length: int) -> str:
        task = Lines(samples=1, share_lengths=share)
        unit = task.part(length, [0], 4000)
        return text_of(task.cases(byte_tokenizer(), unit)[0][2])

    assert first(True, 2000)[:1100] == first(True, 4000)[:1100]
    assert first(False, 2000)[:1100] != first(False, 4000)[:1100]


@pytest.mark.parametrize("length", range(1010, 1070, 7))
def test_few_lines_make_any_length(length: int) -> None:
    prompts = prompts_of(Lines(samples=5), length)
    assert {len(p.input_ids) for p in prompts} == {length}
    assert len({p.input_ids for p in prompts}) == 5


@pytest.mark.parametrize("length", [640, 700, 1024])
def test_no_prompt_comes_twice_and_each_is_at_its_depth(length: int) -> None:
    _, tokenizer = longctx.load("demo")
    task = Lines(samples=20)
    prompts = prompts_of(task, length, tokenizer)
    assert len({prompt.input_ids for prompt in prompts}) == 20
    lines = len(LINE.findall(str(tokenizer.decode(list(prompts[0].input_ids)))))
    for index, prompt in enumerate(prompts):
        wanted = task.prompt_spec(index, length, None).depth
        assert abs(prompt.depth - wanted) < 1 / lines, index


def test_fewer_lines_than_depths_are_refused() -> None:
    with pytest.raises(DataError, match=r"length=997 is too short .* or for fewer samples"):
        prompts_of(Lines(samples=10), 997)
    assert len(prompts_of(Lines(samples=1), 997)) == 1


def test_settings_out_of_range() -> None:
    with pytest.raises(DataError, match="depths=0"):
        Lines(depths=0)
    with pytest.raises(DataError, match=r"asks for more lines than the \d+ names there are"):
        prompts_of(Lines(samples=1), 10**6)


def test_the_answer_is_the_number_alone() -> None:
    """Whether a bracket and the line's end are one token must not matter."""
    for prompt in prompts_of(Lines(samples=4), 2000):
        assert prompt.answer == prompt.key
        assert prompt.key.isdigit()
        assert text_of(prompt).endswith(f"<{prompt.key}")


@pytest.mark.parametrize("file", [False, True])
def test_free_answers_are_those_of_a_naive_loop(file: bool, tmp_path: Path) -> None:
    """LongEval's own: `generate` after each prompt, and the last number of what it says."""
    model, tokenizer = longctx.load("demo")
    task = Lines(samples=3, free=True, seed=3, chat=False)
    (unit,) = task.plan(tokenizer, (512,), length_invariant=True).units
    if file:
        path = tmp_path / "lines.jsonl"
        with path.open("w") as lines:
            for _, _, prompt in task.cases(tokenizer, unit):
                ids = list(prompt.input_ids[: prompt.answer_start])
                text = str(tokenizer.decode(ids, skip_special_tokens=True))
                name = re.findall(r"in line (\S+)\?", text)[-1]
                number = {"random_idx": [name, 0], "expected_number": int(prompt.key)}
                lines.write(json.dumps({"prompt": text, **number}) + "\n")
        task = dataclasses.replace(task, file=str(path))
        (unit,) = task.plan(tokenizer, (600,), length_invariant=True).units
    found = task.measure(model, tokenizer, unit, batch_tokens=999, length_invariant=True)
    cases = task.cases(tokenizer, unit)
    for (_, _, prompt), one in zip(cases, found.observations, strict=True):
        ids = torch.tensor([prompt.input_ids[: prompt.answer_start]])
        tokens = greedy(model, ids, 100)[0].tolist()
        ends = [place for place, token in enumerate(tokens) if token == tokenizer.eos_token_id]
        tokens = tokens[: ends[0]] if ends else tokens
        said = str(tokenizer.decode(tokens, skip_special_tokens=True))
        numbers = re.findall(r"\d+", said)
        assert one.detail["said"] == said
        assert one.correct == (bool(numbers) and int(numbers[-1]) == int(prompt.key))
    result = sweep(model, tokenizer, [task], 600 if file else 512, verify=1, progress=False)
    assert [(c.checked, c.disagreements) for c in result.verified] == [(1, ())]


def test_the_last_number_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    task = Lines(samples=4, free=True)
    unit = task.part(2000, range(4), 2000)
    keys = [prompt.key for *_, prompt in task.cases(tokenizer, unit)]
    texts = [f"It is {keys[0]}.", f"{keys[1]} or 12", "none", f"12, no: <{keys[3]}>, I think"]
    said = tuple(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)

    def continued(*_: Any, finished: Any, **__: Any) -> Continuations:
        for row, tokens in enumerate(said):
            finished(row, tokens, 2)
        return Continuations(said, 8, "so")

    monkeypatch.setattr("longctx.eval.tasks.lines.continue_prompts", continued)
    how: Any = {"batch_tokens": 1, "length_invariant": True}
    found = task.measure(byte_model(), tokenizer, unit, **how).observations
    assert [one.correct for one in found] == [True, False, False, True]


def test_free_prompts_have_no_beginning_of_an_answer() -> None:
    (forced, free) = (prompts_of(Lines(samples=1, free=free), 2000)[0] for free in (False, True))
    assert text_of(free)[: -len(free.key)].endswith("I need the number. ")
    assert len(free.input_ids) == 2000
    assert "The <REGISTER_CONTENT> in line" in text_of(forced)[-60:]
    assert "LongEval itself does not give" in Lines().estimand
    assert "the last one of a free greedy answer" in Lines(free=True).estimand
    assert "free" not in Lines().cache_key()
    assert Lines(free=True).cache_key()["free"]
