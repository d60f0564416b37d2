"""From a file to rows for the trainer, with an account that balances."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any, cast

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from longctx.errors import DataError
from longctx.gguf import convert_gguf
from longctx.train.data.chat_template import chat_template
from longctx.train.data.conversations import Turn
from longctx.train.data.preparation import TokenizeSettings, prepare
from longctx.train.data.readers import Records
from longctx.train.data.synthetic import Synthetic, conversations
from longctx.train.data.tokenize import Encoder

from .. import chats

ROOT = Path(os.environ.get("LONGCTX_REAL", Path.home() / ".cache/longctx-real"))
SHAREGPT = ROOT / "sharegpt" / "sharegpt_truncated.json"
GGUF = ROOT / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

Record = dict[str, Any]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def sharegpt(*texts: str) -> Record:
    roles = ("human", "gpt") * len(texts)
    return {
        "conversations": [
            {"from": role, "value": text} for role, text in zip(roles, texts, strict=False)
        ]
    }


def write(path: Path, *records: Record) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def rows(dataset: Any) -> list[tuple[int, list[int], list[int], int]]:
    return [(row["record"], row["input_ids"], row["labels"], row["length"]) for row in dataset]


def test_rows_are_the_conversations(tmp_path: Path) -> None:
    texts = [("Hi", "Hello!"), ("only a question",), ("q1", "a1", "q2", "a2")]
    path = write(tmp_path / "a.jsonl", *(sharegpt(*said) for said in texts))
    prepared = prepare(path, chats.tokenizer())
    expected = [chats.by_hand(chats.tokenizer(), chats.turns(*texts[i])) for i in (0, 2)]
    assert rows(prepared.dataset) == [
        (number, ids, labels, len(ids))
        for number, (ids, labels) in zip((1, 3), expected, strict=True)
    ]
    assert prepared.dataset.column_names == ["record", "input_ids", "labels", "length"]
    report = prepared.report
    assert (report.conversations, report.samples, report.untaught) == (3, 2, 1)
    assert report.kept == report.tokens == sum(len(ids) for ids, _ in expected)
    assert report.supervised == sum(label != -100 for _, labels in expected for label in labels)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = conversations(24, settings=Synthetic(longest=6_000))
    return write(tmp_path_factory.mktemp("data") / "talks.jsonl", *drawn)


def test_processes_and_plain_map_agree(talks: Path) -> None:
    tokenizer, settings = chats.tokenizer(), TokenizeSettings(max_length=700)
    one = prepare(talks, tokenizer, settings)
    two = prepare(talks, tokenizer, settings, workers=2)
    assert two.report == one.report
    assert rows(two.dataset) == rows(one.dataset)

    raw = datasets.Dataset.from_list(
        [
            {
                "record": number,
                "roles": ["user", "assistant"] * (len(record["conversations"]) // 2),
                "texts": [turn["value"] for turn in record["conversations"]],
            }
            for number, record in enumerate(Records(talks), 1)
        ]
    )
    encoder = Encoder(tokenizer, chat_template(tokenizer), settings)
    mapped = raw.map(encoder, batched=True, remove_columns=raw.column_names)
    assert rows(mapped.filter(lambda row: row["length"] > 0)) == rows(one.dataset)


def test_the_account_balances(talks: Path) -> None:
    for overflow in ("continue", "drop", "cut"):
        settings = TokenizeSettings(max_length=900, overflow=cast(Any, overflow))
        prepared = prepare(talks, chats.tokenizer(), settings)
        report = prepared.report
        lengths = np.asarray(prepared.dataset["length"][:])
        assert report.kept == lengths.sum()
        assert lengths.max() <= 900
        assert report.samples == len(lengths)
        assert report.kept + report.dropped - report.repeated == report.tokens
        assert report.repeated == 0  # this template adds nothing before a first turn
        assert all(any(label != -100 for label in row) for row in prepared.dataset["labels"][:])


def test_plain_text(tmp_path: Path) -> None:
    base = chats.tokenizer(None, bos=True)
    path = write(tmp_path / "a.jsonl", {"text": "The grass is green. " * 40}, {"text": "Paris."})
    prepared = prepare(path, base, TokenizeSettings(max_length=64))
    report = prepared.report
    assert report.supervised == report.kept - report.samples
    assert max(prepared.dataset["length"][:]) == 64


LONG = "word " * 80_000


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        ([sharegpt("q")], TokenizeSettings(), "no sample is left.*1, no answered question"),
        (
            [sharegpt("q")],
            TokenizeSettings(strict=True),
            "a.jsonl, record 1: turn 1 of 1 is a question",
        ),
        (
            [sharegpt("q", "a"), {"text": "t"}],
            TokenizeSettings(),
            "record 2 has 'text', the records",
        ),
        (
            [sharegpt(LONG, "a")],
            TokenizeSettings(),
            "no sample is left.*overflow='cut'.*1 exchanges left",
        ),
        (
            [sharegpt("q", LONG)],
            TokenizeSettings(),
            "no sample is left.*1 exchanges left out, too long",
        ),
        (
            [sharegpt(LONG, "a")],
            TokenizeSettings(overflow="cut"),
            "no sample is left.*no answer began",
        ),
        (
            [sharegpt("q", "a"), {"conversations": [{"from": "gtp", "value": ""}]}],
            TokenizeSettings(),
            "record 2, turn 1 has the role 'gtp'.*did you mean 'gpt'",
        ),
        ([], TokenizeSettings(), "a.jsonl holds no records"),
    ],
)
def test_bad_input(
    tmp_path: Path, records: list[Record], settings: TokenizeSettings, message: str
) -> None:
    path = write(tmp_path / "a.jsonl", *records)
    with pytest.raises(DataError, match=f"(?s){message}"):
        prepare(path, chats.tokenizer(), settings)


def test_a_long_answer_is_cut_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sharegpt("q", LONG))
    prepared = prepare(path, chats.tokenizer(), TokenizeSettings(overflow="cut"))
    assert prepared.dataset["length"][:] == [16_384]
    assert chats.tokenizer().eos_token_id not in prepared.dataset["labels"][0]


def test_roles_out_of_order_in_a_worker(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[sharegpt("q", "a")] * 9, sharegpt("q", "a", "q"))
    assert prepare(path, chats.tokenizer()).report.unanswered == 1
    with pytest.raises(DataError, match=r"a\.jsonl, record 10: turn 3 of 3 is a question without"):
        prepare(path, chats.tokenizer(), TokenizeSettings(strict=True), workers=2)


def test_tokenizers_that_cannot_serve(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sharegpt("q", "a"))
    with pytest.raises(DataError, match=r"no chat template.*--template vicuna"):
        prepare(path, chats.tokenizer(None))
    prepared = prepare(path, chats.tokenizer(None), TokenizeSettings(template="vicuna"))
    assert prepared.report.samples == 1

    class Slow:
        """Says that it is slow."""

        is_fast = False

    slow: Any = Slow()
    with pytest.raises(DataError, match=r"Slow cannot say which characters.*fast tokenizer"):
        Encoder(slow, None, TokenizeSettings())


def test_a_file_that_breaks_off(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sharegpt("q", "a"), sharegpt("q", "a"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="breaks off: after 1 whole records"):
        prepare(path, chats.tokenizer())
    report = prepare(path, chats.tokenizer(), salvage=True).report
    assert report.conversations == 1
    assert "salvaged 1 whole records" in str(report)


def test_bad_records_are_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    odd = {"conversations": [{"from": "judge", "value": "a"}]}
    records = [sharegpt("q", "a"), odd, odd, {"text": "t"}, {**sharegpt("q", "a"), "id": 4}]
    path = write(tmp_path / "a.jsonl", *records)
    with pytest.raises(DataError, match="record 2, turn 1 has the role 'judge'"):
        prepare(path, chats.tokenizer())
    for workers in (1, 2):
        prepared = prepare(path, chats.tokenizer(), skip_bad=True, workers=workers)
        assert prepared.dataset["record"][:] == [1, 5]
        assert prepared.report.notes == (
            "records left out: 2 × an unknown role (record 2 the first)",
            "record left out: another schema (record 4)",
            "fields that are not used: 'id' (1)",
        )
    with pytest.raises(DataError, match=r"no record is left\. record left out: an unknown"):
        prepare(write(tmp_path / "b.jsonl", odd), chats.tokenizer(), skip_bad=True)


def test_what_the_template_refuses_is_left_out_too(tmp_path: Path) -> None:
    head = {"from": "system", "value": "s"}
    refused = {"conversations": [head, *sharegpt("q", "a")["conversations"]]}
    path = write(tmp_path / "a.jsonl", refused, sharegpt("q", "a"))
    tokenizer = chats.tokenizer(chats.LLAMA2)
    with pytest.raises(DataError, match=r"record 1: .*System role not supported"):
        prepare(path, tokenizer)
    report = prepare(path, tokenizer, skip_bad=True).report
    assert (report.samples, report.refused) == (1, 1)


def test_tools_that_the_template_does_not_write(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    ask, say = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    used = {"messages": [ask, call, {"role": "tool", "content": "7"}, say]}
    path = write(tmp_path / "a.jsonl", {"messages": [ask, say]}, used)
    for source, samples in ((chats.VICUNISH, 1), (chats.LLAMA2, 1), (chats.TOOLS, 2)):
        report = prepare(path, chats.tokenizer(source)).report
        assert (report.samples, report.unwritten) == (samples, 2 - samples)
    with pytest.raises(DataError, match="record 2: the chat template does not write the tools"):
        prepare(path, chats.tokenizer(chats.VICUNISH), TokenizeSettings(strict=True))


@pytest.mark.real
@pytest.mark.skipif(not (SHAREGPT.exists() and GGUF.exists()), reason="no real files there")
def test_real_sharegpt_is_labelled_on_answers_and_nothing_else() -> None:
    with pytest.raises(DataError, match=r"after 17,671 whole records .* at byte 125,506,645"):
        sum(1 for _ in Records(SHAREGPT))
    records = list(Records(SHAREGPT, salvage=True))
    assert len(records) == 17_671
    tokenizer: Any = AutoTokenizer.from_pretrained(convert_gguf(GGUF))
    encoder = Encoder(tokenizer, chat_template(tokenizer), TokenizeSettings(max_length=16_384))
    names = {"human": "user", "user": "user", "system": "system"}
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]

    def control(text: str) -> bool:
        return any(token in text for token in added)

    checked = answers = 0
    for record in Random(0).sample(records, 2_000):
        said = [
            Turn(cast(Any, names.get(turn["from"], "assistant")), turn["value"])
            for turn in record["conversations"]
        ]
        roles, texts = [turn.role for turn in said], [turn.text for turn in said]
        while said and said[0].role == "assistant":
            said = said[1:]
        first = said[:1] if said and said[0].role == "system" else []
        rest = said[len(first) :]
        rest = rest[: len(rest) // 2 * 2]
        in_turn = [turn.role for turn in rest] == ["user", "assistant"] * (len(rest) // 2)
        if not rest or not in_turn or any(not t.text.strip() or control(t.text) for t in rest):
            continue
        ids, labels = chats.by_hand(tokenizer, [*(first or [Turn("system", default)]), *rest])
        if len(ids) > 16_384:
            continue
        columns = encoder({"record": [1], "roles": [roles], "texts": [texts]})
        assert columns["input_ids"][0].tolist() == ids
        assert columns["labels"][0].tolist() == labels
        checked += 1
        answers += len(rest) // 2
        if checked == 500:
            break
    assert checked == 500
    assert answers > 1_000
