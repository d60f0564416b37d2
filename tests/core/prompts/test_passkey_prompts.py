"""Prompts as text and as ids: exact, honest at the seams, disjoint between the splits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from longctx.errors import DataError
from longctx.prompts.haystacks import Grass, Haystack, Texts
from longctx.prompts.passkey_prompts import CLASSIC, SHORT, Prompt, passkey, split_of

TEXTS = Texts(
    tuple(
        "\n".join(f"Line {i} of text {name} has a middle. And an end." for i in range(200))
        for name in ("one", "two")
    )
)
GOLDEN_KEYS = ["99340", "71709", "95076", "45190"]
"""Of seeds 1 and 2 in each split."""
HAYSTACKS = pytest.mark.parametrize("haystack", [Grass(), TEXTS], ids=["grass", "texts"])
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(
    *, bos: bool = True, chat: bool = False, merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """Bytes, with merges on top."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [left + right for left, right in merges]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


PLAIN = build(bos=False)


def make(**changes: Any) -> Prompt:
    settings: dict[str, Any] = {"length": 900, "depth": 0.5, "seed": 1, "haystack": Grass()}
    settings |= changes
    return passkey(settings.pop("tokenizer", PLAIN), settings.pop("length"), **settings)


def text_of(prompt: Prompt, tokenizer: PreTrainedTokenizerFast = PLAIN) -> str:
    return str(tokenizer.decode(list(prompt.input_ids)))


@HAYSTACKS
@pytest.mark.parametrize("length", [300, 301, 777, 4096])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_every_length_is_exact_and_the_text_is_whole(
    haystack: Haystack, length: int, depth: float
) -> None:
    prompt = make(haystack=haystack, length=length, depth=depth)
    assert len(prompt.input_ids) == length
    needle = f"\nThe pass key is {prompt.key}. Remember it. {prompt.key} is the pass key.\n"
    text = text_of(prompt)
    assert text.startswith(CLASSIC.intro + "\n")
    assert text.endswith(f"\nWhat is the pass key? The pass key is {prompt.key}")
    assert text.count(needle) == 1
    # A token is a byte here, so the characters before the needle are the tokens before it.
    assert text.index(needle) in (prompt.needle_starts[0], prompt.needle_starts[0] - 1)


@HAYSTACKS
def test_the_haystack_is_cut_at_its_end_alone(haystack: Haystack) -> None:
    prompt = make(haystack=haystack)
    whole = "\n\n".join(TEXTS.documents) if haystack is TEXTS else " ".join([Grass().line] * 20)
    text = text_of(prompt).removeprefix(CLASSIC.intro + "\n")
    before, after = re.split(r"\n?The pass key is \d+\. .* key\.\n", text, maxsplit=1)
    after = after[: after.index("\nWhat is the pass key?")]
    assert before.endswith((".", "\n"))
    assert any(before + glue + after in whole for glue in ("", "\n"))


def test_depth_is_the_one_realised() -> None:
    head = len(CLASSIC.intro) + 1
    frame = len(text_of(make(length=4000)).split("What is")[-1]) + len("\nWhat is") + head
    for wanted in (0.0, 0.1, 0.5, 0.77, 1.0):
        prompt = make(length=4000, depth=wanted)
        needle = len(
            f"\nThe pass key is {prompt.key}. Remember it. {prompt.key} is the pass key.\n"
        )
        hay = 4000 - frame - needle
        assert prompt.depth == pytest.approx((prompt.needle_starts[0] - head) / hay, abs=1e-3)
        assert abs(prompt.depth - wanted) < 0.01


def test_the_same_arguments_give_the_same_prompt_on_every_platform() -> None:
    keys = [make(seed=seed, split=split).key for split in ("eval", "train") for seed in (1, 2)]
    assert keys == GOLDEN_KEYS
    assert make() == make()
    assert make(seed=2).key != make(seed=3).key


def test_the_splits_share_no_key() -> None:
    found = {
        split: {make(length=250, seed=i, split=split, digits=3).key for i in range(400)}
        for split in ("eval", "train")
    }
    assert not found["eval"] & found["train"]
    assert min(map(len, found.values())) > 60
    for split, keys in found.items():
        assert {split_of(key) for key in keys} == {split}
    share = sum(split_of(str(key)) == "eval" for key in range(10000, 100000)) / 90000
    assert share == pytest.approx(1 / 8, abs=0.005)


def test_no_digit_betrays_the_split() -> None:
    last = [key % 10 for key in range(10000, 100000) if split_of(str(key)) == "eval"]
    assert all(last.count(digit) / len(last) == pytest.approx(0.1, abs=0.01) for digit in range(10))


@pytest.mark.parametrize(
    ("merges", "answer"),
    [
        ((), "{key}"),  # the space is a token of its own and given
        (tuple(("Ġ", str(digit)) for digit in range(10)), " {key}"),  # or part of the first digit
        ((("1", "9"), ("4", "6"), ("9", "8"), ("0", "1")), "{key}"),
    ],
    ids=["digits", "space and digit", "pairs of digits"],
)
def test_answer_is_what_a_full_tokenisation_adds(
    merges: tuple[tuple[str, str], ...], answer: str
) -> None:
    tokenizer = build(bos=False, merges=merges)
    for seed in range(20):
        prompt = make(tokenizer=tokenizer, seed=seed, wording=SHORT)
        text = text_of(prompt, tokenizer)
        question = text[text.rindex("\nWhat is") :]
        full = tokenizer(question)["input_ids"]
        assert list(prompt.input_ids[-len(full) :]) == full
        assert tokenizer.decode(list(prompt.answer_ids)) == prompt.answer
        assert prompt.answer == answer.format(key=prompt.key)
        given = str(tokenizer.decode(list(prompt.input_ids[: prompt.answer_start])))
        assert given.rstrip(" ").endswith("The pass key is")


def test_bos_comes_from_the_tokenizer_and_eos_is_left_out() -> None:
    prompt = make(tokenizer=build(bos=True))
    assert prompt.input_ids[0] == 0
    assert 0 not in prompt.input_ids[1:]
    assert 1 not in prompt.input_ids
    assert make().input_ids[0] == PLAIN("T")["input_ids"][0]


def test_a_chat_ends_in_the_assistants_turn() -> None:
    tokenizer = build(bos=True, chat=True)
    prompt = make(tokenizer=tokenizer)
    text = text_of(prompt, tokenizer)
    assert text.startswith(f"<|im_start|>user\n{CLASSIC.intro}\n")
    end = "\nWhat is the pass key?<|im_end|>\n<|im_start|>assistant\nThe pass key is "
    assert text.endswith(end + prompt.key)
    assert "<s>" not in text  # the template brings its own special tokens
    assert len(prompt.input_ids) == 900
    without = text_of(make(tokenizer=tokenizer, chat=False), tokenizer)
    assert "<|im_" not in without
    with pytest.raises(DataError, match="no chat template; pass chat=False"):
        make(chat=True)


@HAYSTACKS
def test_further_pairs_have_names_and_keys_of_their_own(haystack: Haystack) -> None:
    for seed in range(10):
        prompt = make(haystack=haystack, length=1500, pairs=4, seed=seed)
        text = text_of(prompt)
        stated = re.findall(
            r"The (\w+) key is (\d+)\. Remember it\. (\d+) is the (\w+) key\.", text
        )
        assert len(stated) == 4
        assert all(one[1] == one[2] and one[0] == one[3] for one in stated)
        assert len({one[0] for one in stated}) == len({one[1] for one in stated}) == 4
        asked = re.search(r"What is the (\w+) key\? The \1 key is (\d+)$", text)
        assert asked
        assert asked.groups() in [one[:2] for one in stated]
        assert asked[2] == prompt.key
        assert text[prompt.needle_starts[0] :].lstrip().startswith(f"The {asked[1]} key is")
        assert {split_of(one[1]) for one in stated} == {"eval"}


def test_one_haystack_seed_gives_one_prefix() -> None:
    shared = [make(haystack=TEXTS, seed=seed, haystack_seed=5, depth=0.6) for seed in range(6)]
    assert len({prompt.haystack for prompt in shared}) == 1
    assert len({prompt.input_ids[: prompt.needle_starts[0]] for prompt in shared}) == 1
    assert len({prompt.key for prompt in shared}) == 6
    assert len({make(haystack=TEXTS, seed=seed).haystack for seed in range(6)}) > 1


def test_too_short_names_the_minimum_which_then_suffices() -> None:
    with pytest.raises(DataError, match="length=100 is too short") as caught:
        make(length=100)
    found = re.search(r"at least (\d+) tokens", str(caught.value))
    assert found
    least = int(found[1])
    assert len(make(length=least).input_ids) == least
    with pytest.raises(DataError, match=f"at least {least} tokens"):
        make(length=least - 1)


def test_a_text_is_never_stretched() -> None:
    with pytest.raises(DataError, match="haystack 'small' has 40 tokens, the prompt needs"):
        make(haystack=Texts(("All that there is. " * 2 + "\n\n",), name="small"))
    with pytest.raises(DataError, match="holds no text in its 2 documents"):
        Texts(("", " \n"))


def test_a_tokenizer_that_loses_digits_is_refused() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "The": 1, "key": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    with pytest.raises(DataError, match=r"does not round-trip the key '\d+'"):
        make(tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 1.01}, r"depth=1\.01 .* from 0 to 1"),
        ({"depth": float("nan")}, "depth=nan .* from 0 to 1"),
        ({"digits": 2}, "digits=2: pass 3 to 18"),
        ({"pairs": 0}, "pairs=0: pass 1 to 10"),
        ({"pairs": 11}, "pairs=11: pass 1 to 10"),
        ({"split": "test"}, "split='test' .* 'eval' or 'train'"),
        ({"wording": replace(SHORT, needle="The key.")}, "needle 'The key.' must hold"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(**changes)
