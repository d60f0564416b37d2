"""Ids and labels against conversations tokenised piece by piece, and what over-length does."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longctx.errors import DataError
from longctx.train.data.chat_template import chat_template
from longctx.train.data.conversations import Turn
from longctx.train.data.data_report import COUNTS
from longctx.train.data.token_places import Places, across_of
from longctx.train.data.tokenize import Encoder, TokenizeSettings

from .. import chats

Rows = list[tuple[list[int], list[int]]]


def encode(
    said: tuple[Turn, ...], settings: TokenizeSettings | None = None, tokenizer: Any = None
) -> tuple[Rows, dict[str, int]]:
    """Samples of a conversation, and its counts."""
    tokenizer = tokenizer or chats.tokenizer()
    settings = settings or TokenizeSettings()
    template = None
    if said[0].role != "document":
        template = chat_template(tokenizer, settings.template)
    columns = Encoder(tokenizer, template, settings)(
        {
            "record": [1],
            "roles": [[t.role for t in said]],
            "texts": [[t.text for t in said]],
            "learnt": [[t.learnt for t in said]],
            "fields": [[t.fields for t in said]],
        }
    )
    rows = [
        (ids.tolist(), labels.tolist())
        for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True)
        if len(ids)
    ]
    assert [len(ids) for ids, _ in rows] == [n for n in columns["length"] if n]
    totals: Any = sum(columns["counts"])
    counts = dict(zip(COUNTS, map(int, totals), strict=True))
    return rows, counts


def words(rng: Random, count: int) -> str:
    return " ".join(
        rng.choice(["grass", "green", "Paris", "\n\n", "caf\u00e9 \u65e5", "."])
        for _ in range(count)
    )


@pytest.mark.parametrize("seed", range(20))
def test_labels_are_the_answers_and_their_end_tokens(seed: int) -> None:
    rng = Random(seed)
    texts = [words(rng, rng.randrange(1, 30)) + "x" for _ in range(2 * rng.randrange(1, 6))]
    said = chats.turns(*texts, system="Be kind." if seed % 2 else "")
    (row,), counts = encode(said)
    assert row == chats.by_hand(chats.tokenizer(), said)
    ids, labels = row
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    spoken = "".join(f"{text}<|im_end|>" for text in texts[1::2])
    assert chats.tokenizer().decode(learnt) == spoken
    assert counts["supervised"] == len(learnt)


def test_an_answer_that_begins_with_a_line_break_is_tokenised_as_served() -> None:
    tokenizer = chats.tokenizer()
    head, answer = "<|im_start|>assistant\n", "\n\nHello"
    served = tokenizer(head)["input_ids"] + tokenizer(answer)["input_ids"]
    assert tokenizer(head + answer)["input_ids"] != served  # else this test shows nothing
    said = chats.turns("Hi", answer, "And", "Fine", "So", "\n\n\nBye")
    assert encode(said)[0] == [chats.by_hand(tokenizer, said)]


@pytest.mark.parametrize("template", [chats.LLAMA3, chats.LLAMA2, "vicuna"])
def test_other_templates_learn_the_answers(template: str) -> None:
    tokenizer = chats.tokenizer(None if template == "vicuna" else template)
    settings = TokenizeSettings(template="vicuna" if template == "vicuna" else None)
    ((ids, labels),), _ = encode(chats.turns("Hi", "Hello!", "And", "Fine."), settings, tokenizer)
    parts: list[str] = []
    pairs = list(zip(ids, labels, strict=True))
    for index, (token, label) in enumerate(pairs):
        if label != -100:
            if index == 0 or pairs[index - 1][1] == -100:
                parts.append("")
            parts[-1] += tokenizer.decode([token])
    assert [part.split() for part in parts] in (
        [["Hello!<|im_end|>"], ["Fine.<|im_end|>"]],
        [["Hello!", "<|im_end|>"], ["Fine.", "<|im_end|>"]],
    )


def test_a_sentencepiece_like_tokenizer() -> None:
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(["USER: Hello there ASSISTANT: it is fine . ' A chat"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    said = chats.turns("Hello", "it is fine", "there", "is it")
    ((ids, labels),), _ = encode(said, TokenizeSettings(template="vicuna"), tokenizer)
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert tokenizer.convert_ids_to_tokens(learnt).count("</s>") == 2
    assert str(tokenizer.decode(learnt)).replace(" ", "") == "itisfine</s>isit</s>"


def long_talk(rng: Random, exchanges: int, system: str) -> tuple[Turn, ...]:
    texts = [f"{index} " + words(rng, rng.randrange(1, 40)) for index in range(2 * exchanges)]
    return chats.turns(*texts, system=system)


def hand(*said: Turn) -> tuple[list[int], list[int]]:
    return chats.by_hand(chats.tokenizer(), said)


@pytest.mark.parametrize("system", ["", "Be kind, and be brief."])
@pytest.mark.parametrize("seed", range(6))
def test_continue_keeps_every_exchange_once_and_as_many_to_a_sample_as_fit(
    seed: int, system: str
) -> None:
    rng = Random(seed)
    most = 260
    said = long_talk(rng, 14, system)
    head = said[: bool(system)]
    pairs = [said[i : i + 2] for i in range(len(head), len(said), 2)]
    expected: Rows = []
    part: list[Turn] = []
    left_out = 0
    for pair in pairs:  # greedy, by tokenising each candidate anew
        if len(hand(*head, *part, *pair)[0]) <= most:
            part += pair
            continue
        if part:
            expected.append(hand(*head, *part))
        part = list(pair)
        if len(hand(*head, *pair)[0]) > most:
            left_out += 1
            part = []
    if part:
        expected.append(hand(*head, *part))
    rows, counts = encode(said, TokenizeSettings(max_length=most))
    assert rows == expected
    assert len(rows) > 1
    assert counts["too_long"] == left_out
    assert counts["continued"] == 1
    assert counts["kept"] == sum(len(ids) for ids, _ in expected)
    whole = len(hand(*said)[0])
    heads = (len(rows) - 1) * (len(hand(*head)[0]) if head else 0)
    assert counts["tokens"] == whole
    assert counts["kept"] - heads + counts["dropped"] == whole


def test_an_exchange_too_long_on_its_own_is_left_out_and_never_bridged() -> None:
    said = chats.turns("q0", "a0", "q1", "a " * 300, "q2", "a2", "q3", "a3")
    rows, counts = encode(said, TokenizeSettings(max_length=100))
    assert rows == [hand(*said[:2]), hand(*said[4:])]
    assert (counts["too_long"], counts["continued"], counts["samples"]) == (1, 1, 2)


def test_drop_keeps_the_beginning() -> None:
    said = long_talk(Random(3), 14, "Be kind.")
    (kept,), counts = encode(said, TokenizeSettings(max_length=260, overflow="drop"))
    (first, *_), _ = encode(said, TokenizeSettings(max_length=260))
    assert kept == first
    assert counts["kept"] + counts["dropped"] == counts["tokens"]
    assert counts["continued"] == 0


def test_cut_is_plain_truncation() -> None:
    said = long_talk(Random(4), 14, "")
    ids, labels = hand(*said)
    (row,), counts = encode(said, TokenizeSettings(max_length=201, overflow="cut"))
    assert row == (ids[:201], labels[:201])
    assert (counts["cut"], counts["dropped"]) == (1, len(ids) - 201)
    rows, counts = encode(
        chats.turns("q " * 300, "a"), TokenizeSettings(max_length=100, overflow="cut")
    )
    assert rows == []
    assert (counts["unsupervised"], counts["samples"], counts["kept"]) == (1, 0, 0)
    assert counts["dropped"] == counts["tokens"]


def test_turns_left_out_are_counted_and_strict_refuses_them() -> None:
    exchanges = chats.turns("q", "a", " ", "a", "<|im_end|>", "a", "q")
    mixed = (Turn("assistant", "a"), *exchanges)
    rows, counts = encode(mixed)
    assert rows == [hand(*mixed[1:3])]
    reasons = ("leading", "blank", "special", "unanswered")
    assert [counts[reason] for reason in reasons] == [1, 2, 2, 1]
    with pytest.raises(DataError, match="record 1: turn 1 of 8 is an answer before any question"):
        encode(mixed, TokenizeSettings(strict=True))
    with pytest.raises(DataError, match="turn 1 of 2 is a question without an answer"):
        encode((Turn("user", "q"), Turn("user", "q")), TokenizeSettings(strict=True))
    with pytest.raises(DataError, match="no assistant turn"):
        encode((Turn("system", "s"),), TokenizeSettings(strict=True))
    rows, counts = encode((Turn("user", "q"),))
    assert (rows, counts["untaught"]) == ([], 1)


def test_documents_are_learnt_whole() -> None:
    tokenizer = chats.tokenizer(None, bos=True)
    text = "The grass is green. <|im_start|>" * 9
    body = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in body
    ((ids, labels),), counts = encode((Turn("document", text),), None, tokenizer)
    assert ids == [bos, *body, eos]
    assert labels == [-100, *body, eos]
    assert counts["supervised"] == len(body) + 1
    rows, counts = encode((Turn("document", text),), TokenizeSettings(max_length=50), tokenizer)
    assert all(ids[0] == bos and len(ids) <= 50 for ids, _ in rows)
    assert list(chain.from_iterable(ids[1:] for ids, _ in rows)) == [*body, eos]
    rows, counts = encode(
        (Turn("document", text),), TokenizeSettings(max_length=50, overflow="cut"), tokenizer
    )
    assert [ids for ids, _ in rows] == [[bos, *body[:49]]]
    assert counts["dropped"] == len(body) + 1 - 49
    assert encode((Turn("document", " \n"),), None, tokenizer)[0] == []


def test_an_answer_without_weight_is_context() -> None:
    said = chats.turns("q", "wrong", "q", "right")
    masked = (said[0], replace(said[1], learnt=False), *said[2:])
    ((ids, labels),), counts = encode(masked)
    whole, _ = hand(*said)
    assert ids == whole
    learnt = [label for label in labels if label != -100]
    assert chats.tokenizer().decode(learnt) == "right<|im_end|>"
    assert counts["masked"] == 1
    rows, counts = encode((said[0], replace(said[1], learnt=False)))
    assert (rows, counts["untaught"], counts["masked"]) == ([], 1, 1)


def test_calls_and_results_of_tools() -> None:
    tokenizer = chats.tokenizer(chats.TOOLS)
    fields = json.dumps({"tool_calls": [{"function": {"name": "look"}}]})
    ask, call = Turn("user", "q"), Turn("assistant", "", fields=fields)
    said = (ask, call, Turn("tool", "7"), Turn("assistant", "It is 7"))
    ((ids, labels),), _ = encode(said, None, tokenizer)
    spoken = (ask, Turn("assistant", "look"), Turn("tool", "7"), Turn("assistant", "It is 7"))
    assert (ids, labels) == hand(*spoken)


def thoughtful(*said: Turn) -> tuple[list[int], list[int]]:
    """FORGETFUL by hand: the last answer alone has a thought, and is learnt."""
    ids, _ = hand(*said[:-1])
    answer = replace(said[-1], text=f"<think></think>{said[-1].text}")
    last, labels = hand(answer)
    return ids + last, [-100] * len(ids) + labels


def test_a_template_that_drops_thoughts_gives_a_sample_for_each_answer() -> None:
    tokenizer = chats.tokenizer(chats.FORGETFUL)
    said = chats.turns("q0", "a0", "q1", "a1", "q2", "a2", system="s")
    rows, counts = encode(said, None, tokenizer)
    assert rows == [thoughtful(*said[:end]) for end in (3, 5, 7)]
    assert counts["single"] == 1
    assert counts["kept"] == counts["tokens"] == sum(len(ids) for ids, _ in rows)
    # Where not all fits, the exchanges next to the answer stand before it, and the system turn.
    room = len(rows[1][0])
    short, counts = encode(said, TokenizeSettings(max_length=room), tokenizer)
    assert short == [*rows[:2], thoughtful(said[0], *said[3:7])]
    assert counts["kept"] + counts["dropped"] == counts["tokens"]
    assert len(encode(said, TokenizeSettings(max_length=room, overflow="drop"), tokenizer)[0]) == 2
    masked = (*said[:2], replace(said[2], learnt=False), *said[3:])
    assert encode(masked, None, tokenizer)[0] == rows[1:]


@pytest.mark.parametrize("seed", range(10))
def test_places_asked_of_the_tokenizer_are_those_of_all_tokens(seed: int) -> None:
    rng = Random(seed)
    said = chats.turns(*(words(rng, 20) for _ in range(6)))
    rendered = chat_template(chats.tokenizer()).render(said)
    (found,) = chats.tokenizer()([rendered.text], add_special_tokens=False).encodings
    fast = Places.of(rendered, found)
    slow = Places.of_pieces(rendered, [found], [0, len(rendered.text)])
    if fast is None:  # a token lies across the end of a prompt
        assert across_of(rendered, found)
        return
    assert fast.ids.tolist() == slow.ids.tolist()
    assert (fast.firsts, fast.afters) == (slow.firsts, slow.afters)
    ids = range(len(fast.ids))
    assert [fast.characters(at) for at in ids] == [slow.characters(at) for at in ids]


def test_a_template_without_an_end_token_is_refused() -> None:
    with pytest.raises(DataError, match=r"no end token: the model would not learn to stop"):
        encode(chats.turns("q", "a"), None, chats.tokenizer(chats.ENDLESS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_length": 1}, "max_length=1: pass"), ({"overflow": "trim"}, "overflow='trim' is not")],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TokenizeSettings(**settings)


@pytest.mark.parametrize("source", ["", "hello"])
def test_a_template_that_writes_no_answer_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="writes nothing of an answer"):
        encode(chats.turns("q", "a"), None, chats.tokenizer(source or "{# nothing #}"))
