"""LongEval's published files, and what can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longctx.errors import DataError
from longctx.eval import Lines, Topics, sweep

from ...conftest import byte_model, byte_tokenizer
from ...retrieval_tasks import generated, text_of


def lines_case(count: int) -> dict[str, Any]:
    record = "".join(f"line calm-{i}: REGISTER_CONTENT is <{i + 41}>\n" for i in range(count))
    return {
        "random_idx": ["calm-3", 3],
        "expected_number": 44,
        "num_lines": count,
        "correct_line": "line calm-3: REGISTER_CONTENT is <44>\n",
        "prompt": f"Below is a record.\n\n{record}\nNow tell me what is in line calm-3? ",
    }


TOPICS = {
    "prompt": "USER: I would like to discuss the topic of the joy of art. \n Now, the first topic?",
    "topics": ["The joy of art", "The rest"],
}


@pytest.fixture
def lines_file(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(lines_case(n)) + "\n" for n in (5, 20, 6, 7)))
    return path


def test_prompts_go_to_the_shortest_length_that_holds_them(lines_file: Path) -> None:
    task = Lines(file=str(lines_file), samples=2)
    plan = task.plan(byte_tokenizer(), (300, 400, 1000), length_invariant=True)
    assert {unit.lengths: unit.spec["prompts"] for unit in plan.units} == {
        (300,): [0],
        (400,): [2, 3],
        (1000,): [1],
    }
    assert plan.notes[0] == "lines at 300: 1 of the 1 prompts of lines.jsonl that need this length"
    result = sweep(byte_model(), byte_tokenizer(), [task], (300, 1000), verify=9, progress=False)
    for observation in (o for record in result.records for o in record.observations):
        assert observation.detail["tokens"] < observation.length
        assert observation.detail["key"] == "44"
        assert observation.detail["wanted_depth"] == observation.detail["depth"], "no grid"
        assert 0 < observation.detail["depth"] < 1
    assert result.verified[0].checked == sum(row.n for row in result.rows)
    assert not result.verified[0].disagreements
    assert "published prompts that have up to that many tokens" in task.estimand


def test_what_a_reader_sees(lines_file: Path, tmp_path: Path) -> None:
    task = Lines(file=str(lines_file))
    (unit,) = task.plan(byte_tokenizer(), (1000,), length_invariant=True).units
    (_, spec, prompt), *_ = task.cases(byte_tokenizer(), unit)
    assert text_of(prompt) == (
        lines_case(5)["prompt"].strip() + " The <REGISTER_CONTENT> in line calm-3 is <44"
    )
    assert spec.index == 0
    assert 0 < prompt.depth < 1
    assert len(generated(byte_model(), prompt)) == len("44")
    path = tmp_path / "topics.jsonl"
    path.write_text(json.dumps(TOPICS))
    topics = Topics(file=str(path))
    (unit,) = topics.plan(byte_tokenizer(), (300,), length_invariant=True).units
    assert text_of(topics.cases(byte_tokenizer(), unit)[0][2]).endswith(
        "first topic? The first topic began with 'I would like to discuss the topic of the joy of "
        "art"
    ), "the topic as the prompt spells it"
    assert topics.cache_key() != Topics().cache_key()


def test_blank_lines_are_no_test_cases(lines_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "gaps.jsonl"
    path.write_text(lines_file.read_text().replace("\n", "\n\n"))
    gaps, plain = Lines(file=str(path)), Lines(file=str(lines_file))
    assert gaps.cache_key() == plain.cache_key()
    with pytest.raises(DataError, match=r"gaps.jsonl:3 has \d+ tokens"):
        gaps.plan(byte_tokenizer(), (300, 400), length_invariant=True)


def test_what_does_not_fit_is_refused(lines_file: Path) -> None:
    task = Lines(file=str(lines_file))
    with pytest.raises(DataError, match=r"lines.jsonl:2 has \d+ tokens, more than the longest"):
        task.plan(byte_tokenizer(), (300, 400), length_invariant=True)
    with pytest.raises(DataError, match="share_lengths is for prompts that are drawn"):
        Lines(file=str(lines_file), share_lengths=True)
    assert not task.draws_prompts
    assert Lines().draws_prompts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.jsonl is empty: fetch it again"),
        ("\n \n", "x.jsonl is empty"),
        ("\n\n[]\n", r"x.jsonl:3 is \[\]: expected a JSON object"),
        (json.dumps({**lines_case(4), "expected_number": 45}), "expects 45, but its prompt says"),
        (json.dumps({**lines_case(4), "expected_number": True}), "has True as 'expected_number'"),
        ('{"prompt": "a"', "x.jsonl:1 breaks off: fetch the file again"),
        ('{"prompt": }\n', "x.jsonl:1 is not JSON .*column"),
        ("[]\n", r"x.jsonl:1 is \[\]: expected a JSON object"),
        (json.dumps(TOPICS), r"x.jsonl:1 has no 'random_idx' \(fields: prompt, topics\)"),
        (json.dumps({**lines_case(4), "random_idx": []}), r"x.jsonl:1 has \[\] as 'random_idx'"),
        (json.dumps({**lines_case(4), "expected_number": "4"}), "has '4' as 'expected_number'"),
        (json.dumps({**lines_case(4), "random_idx": ["z", 1]}), "holds no 'line z:'"),
    ],
)
def test_files_with_something_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        Lines(file=str(path)).plan(byte_tokenizer(), (4000,), length_invariant=True)


def test_files_that_are_no_text_or_hold_another_topic(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(DataError, match="cannot read"):
        Topics(file=str(path)).plan(byte_tokenizer(), (400,), length_invariant=True)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="is not UTF-8"):
        Topics(file=str(path)).plan(byte_tokenizer(), (400,), length_invariant=True)
    (tmp_path / "y").write_text(json.dumps({**TOPICS, "topics": ["Other"]}))
    (tmp_path / "z").write_text(json.dumps({**TOPICS, "topics": [3]}))
    with pytest.raises(DataError, match="has 3 as its first topic: expected a string"):
        Topics(file=str(tmp_path / "z")).plan(byte_tokenizer(), (400,), length_invariant=True)
    with pytest.raises(DataError, match="holds nothing of 'Other'"):
        Topics(file=str(tmp_path / "y")).plan(byte_tokenizer(), (400,), length_invariant=True)
