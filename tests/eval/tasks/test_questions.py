"""Questions of a file: prompts, lengths, metrics against naive forms, and every bad line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longctx.errors import DataError
from longctx.eval import sweep
from longctx.eval.tasks.questions import Questions
from longctx.eval.tasks.shared.answer_metrics import answer_score, normalised
from longctx.scoring.greedy import greedy

from ..conftest import byte_model, byte_tokenizer

needs_rouge = pytest.mark.skipif(
    importlib.util.find_spec("rouge_score") is None, reason="rouge-score is not installed"
)


def case(size: int, **fields: Any) -> dict[str, Any]:
    context = "".join(f"Line {i} says {i * i}.\n" for i in range(size))[:size]
    return {"context": context, "question": "What does line 3 say?", "answers": ["9"], **fields}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "set.jsonl"
    cases = [case(100), case(300, metric="contains"), case(250), case(900, new_tokens=9)]
    file.write_text("\n".join(map(json.dumps, cases)) + "\n\n")
    return file


def numbers(task: Questions, lengths: tuple[int, ...]) -> tuple[dict[int, list[int]], str]:
    plan = task.plan(byte_tokenizer(), lengths, length_invariant=True)
    return {u.lengths[0]: u.spec["prompts"] for u in plan.units}, "\n".join(plan.notes)


def test_prompts_go_to_the_shortest_length_that_holds_them(path: Path) -> None:
    task = Questions(file=str(path), new_tokens=20)
    found, notes = numbers(task, (300, 600, 1200))
    assert found == {300: [0], 600: [1, 2], 1200: [3]}
    assert "questions at 600: 2 of the 2 prompts of set.jsonl that need this length" in notes
    assert numbers(Questions(file=str(path), samples=1), (600, 1200))[0] == {600: [0], 1200: [3]}
    with pytest.raises(DataError, match=r"1 of 4 prompts .* longest length asked for, 600: line 4"):
        numbers(task, (600,))
    found, notes = numbers(Questions(file=str(path), longer="leave_out"), (600,))
    assert found == {600: [0, 1, 2]}
    assert "1 of 4 prompts of set.jsonl are longer than 600 tokens and left out" in notes


def test_the_middle_of_the_context_is_cut_when_told(path: Path) -> None:
    task, tokenizer = Questions(file=str(path), longer="truncate"), byte_tokenizer()
    found, notes = numbers(task, (600,))
    assert found == {600: [0, 1, 2, 3]}
    assert "4 of the 4 prompts" in notes
    assert "1 of them cut in the middle of the context" in notes
    (unit,) = task.plan(tokenizer, (600,), length_invariant=True).units
    asked = [question for _, question in task.questions(tokenizer, unit)]
    assert len(asked[3].input_ids) == 600 - 9
    text = str(tokenizer.decode(list(asked[3].input_ids), skip_special_tokens=True))
    whole = case(900)["context"]
    room = 900 - asked[3].detail["left_out"]
    assert whole[: room // 2] + whole[-(room - room // 2) :] in text
    assert text.endswith("Question: What does line 3 say? Answer:")
    assert all("left_out" not in question.detail for question in asked[:3])
    with pytest.raises(DataError, match=r"length=80 leaves no room for a context of .*set.jsonl"):
        numbers(task, (80,))


def test_scores_are_those_of_a_naive_loop(path: Path) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    task = Questions(file=str(path), new_tokens=20)
    plan = task.plan(tokenizer, (600, 1200), length_invariant=True)
    for unit in plan.units:
        found = task.measure(model, tokenizer, unit, batch_tokens=1, length_invariant=True)
        for (_, one), observed in zip(
            task.questions(tokenizer, unit), found.observations, strict=True
        ):
            ids = greedy(model, torch.tensor([one.input_ids]), one.new_tokens)[0].tolist()
            ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
            said = tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True)
            wanted = answer_score(one.detail["metric"], str(said).strip(), one.references)
            assert observed.detail["score"] == wanted
            assert str(said).startswith(observed.detail["said"])
    result = sweep(model, tokenizer, [task], (600, 1200), verify=4, progress=False)
    assert [(c.checked, c.disagreements) for c in result.verified] == [(4, ())]
    assert result.row("none", "questions", 1200).n == 1


def test_parts_count_alike(tmp_path: Path) -> None:
    file = tmp_path / "parts.jsonl"
    file.write_text("\n".join(json.dumps(case(90 + i, task="ab"[i == 0])) for i in range(4)))
    task = Questions(file=str(file), new_tokens=4)
    result = sweep(byte_model(), byte_tokenizer(), [task], 400, progress=False)
    parts = [o.detail["part"] for record in result.records for o in record.observations]
    assert parts == ["b", "a", "a", "a"]
    assert "none: a part of one cluster" in result.rows[0].interval


def test_metrics() -> None:
    assert normalised("An  Apple, the a Day!") == "apple day"
    assert answer_score("exact_match", "The red house.", ["blue", "red House"]) == 1
    assert answer_score("exact_match", "red", ["red house"]) == 0
    assert answer_score("contains", "It is the Red house", ["red"]) == 1
    assert answer_score("contains", "It is", ["red"]) == 0
    assert answer_score("f1", "a b c d", ["b c x"]) == pytest.approx(2 * 2 / (3 + 3))  # no article
    assert answer_score("f1", "the", ["an"]) == 1
    assert answer_score("f1", "the", ["x"]) == 0


@needs_rouge
def test_rouge_l_is_the_longest_common_subsequence() -> None:
    said, right = "police killed the gunman today", "police kill the gunman"
    common = 3  # police … the gunman
    precision, recall = common / 5, common / 4
    wanted = 2 * precision * recall / (precision + recall)
    assert answer_score("rouge_l", said, [right, "x"]) == pytest.approx(wanted)


def test_rouge_l_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"rouge_l needs rouge-score: pip install"):
        Questions(metric="rouge_l")


@needs_rouge
def test_rouge_l_is_refused_where_no_answer_can_score(tmp_path: Path) -> None:
    file = tmp_path / "chinese.jsonl"
    file.write_text(json.dumps(case(9, answers=["9", "蓝色"], metric="rouge_l")))
    assert answer_score("rouge_l", "蓝色", ["蓝色"]) == 0
    with pytest.raises(DataError, match=r"chinese\.jsonl:1: rouge_l compares .*'蓝色'"):
        numbers(Questions(file=str(file)), (600,))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "is empty"),
        ("{", "breaks off"),
        ("{\n", "is not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"a": ' + "1" * 5000 + "}", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (case(9, context="half \ud800"), r"1 has half a character \('\\ud800'\)"),
        (case(9, answers=["\udc00"]), "1 has half a character"),
        (case(9, context=""), "has '' as 'context'"),
        (case(9, context=7), "has 7 as 'context'"),
        ({"question": "?"}, r"has None as 'context' \(fields: question\)"),
        (case(9, question=" "), "has ' ' as 'question'"),
        (case(9, answers=[]), r"has \[\] as 'answers'"),
        (case(9, answers=None), "has None as 'answers'"),
        (case(9, answers=["a", 3]), "has 3 among its answers"),
        (case(9, metric="bleu"), "'bleu' is not a metric: expected f1"),
        (case(9, metric=3), "has 3 as 'metric'"),
        (case(9, new_tokens=0), "has 0 as 'new_tokens'"),
        (case(9, new_tokens=True), "has True as 'new_tokens'"),
        (case(9, task=3), "has 3 as 'task'"),
        (case(9, cluster=3), "has 3 as 'cluster'"),
        (case(9, metricc="f1"), "has a field 'metricc': did you mean 'metric'"),
        (case(9, tasks="a"), "has a field 'tasks': did you mean 'task'"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, said: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(DataError, match=rf"bad\.jsonl.*{said}"):
        numbers(Questions(file=str(file)), (600,))


def test_bad_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file of questions: pass --tasks questions:file=PATH"):
        numbers(Questions(), (600,))
    with pytest.raises(DataError, match="cannot read"):
        numbers(Questions(file=str(tmp_path / "none")), (600,))
    with pytest.raises(DataError, match="is not a regular file"):
        numbers(Questions(file=str(tmp_path)), (600,))
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(map(json.dumps, (case(9, task="a"), case(9)))))
    with pytest.raises(DataError, match="some lines have a 'task' and others none"):
        numbers(Questions(file=str(file)), (600,))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"samples": 0}, "samples=0"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"metric": "bleu"}, "'bleu' is not a metric"),
        ({"longer": "cut"}, "longer='cut'"),
        ({"template": "{context}"}, r"expected \{question\} in it once"),
    ]
    for fields, said in refused:
        with pytest.raises(DataError, match=said):
            Questions(**fields)
