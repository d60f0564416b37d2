"""DRY, no-repeat and the penalty against forms that are written out token by token."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

import longctx
from longctx.errors import DataError, RunError
from longctx.generation.decodings.dry import Dry, DryProcessor, breaker_tokens
from longctx.generation.decodings.no_repeat import NoRepeat
from longctx.generation.decodings.penalty import Penalty

from ...test_matrix import demo_tokenizer
from .calls import call, process

VOCABULARY = 12
UNTYPED: Any = Dry
NGRAMS: Any = NoRepeat
BREAKERS: tuple[tuple[int, ...], ...] = ((3,), (5, 6))


def dry_brute(tokens: Sequence[int], multiplier: float, base: float, allowed: int) -> list[float]:
    """What is taken off each token's logit after `tokens`."""
    room = len(tokens)  # tokens after the last whole breaker
    for back in range(len(tokens)):
        end = len(tokens) - back
        if any(tuple(tokens[max(0, end - len(b)) : end]) == b for b in BREAKERS):
            room = back
            break
    off = [0.0] * VOCABULARY
    for i in range(len(tokens) - 1):
        n = 0
        while n < room and n <= i and tokens[i - n] == tokens[len(tokens) - 1 - n]:
            n += 1
        following = tokens[i + 1]
        if n >= allowed and (following,) not in BREAKERS:
            off[following] = max(off[following], multiplier * base ** (n - allowed))
    return off


def words(random: Random, count: int) -> list[int]:
    """Tokens that repeat each other now and then."""
    made: list[int] = []
    while len(made) < count:
        if made and random.random() < 0.4:
            start = random.randrange(len(made))
            made += made[start : start + random.randrange(1, 9)]
        else:
            made.append(random.randrange(VOCABULARY))
    return made[:count]


def processor_of(settings: Dry, firsts: list[int], starts: list[int]) -> DryProcessor:
    made = DryProcessor(settings, call(firsts, starts))
    made._breakers = BREAKERS  # pyright: ignore[reportPrivateUsage]
    made._single = [3]  # pyright: ignore[reportPrivateUsage]
    return made


@pytest.mark.parametrize("include_prompt", [False, True])
def test_dry_is_the_brute_form_at_ten_thousand_steps(include_prompt: bool) -> None:
    settings, steps = Dry(breakers=(), include_prompt=include_prompt), 0
    random = Random(1)
    for _ in range(16 if include_prompt else 26):
        rows, prompt, count = 4, random.randrange(1, 12), 100
        firsts = [random.randrange(prompt) for _ in range(rows)]
        starts = [prompt - random.randrange(prompt - first) for first in firsts]
        whole = [words(random, prompt + count) for _ in range(rows)]
        processor = processor_of(settings, firsts, starts)
        begins = firsts if include_prompt else starts
        for size in range(prompt, prompt + count):
            ids = torch.tensor([row[:size] for row in whole])
            if size == prompt + 50:  # cut back: what was carried is of no use
                process(processor, ids[:, : size - 7], torch.zeros(rows, VOCABULARY))
            off = -process(processor, ids, torch.zeros(rows, VOCABULARY))
            wanted = [
                dry_brute(row[begin:size], 0.8, 1.75, 2)
                for row, begin in zip(whole, begins, strict=True)
            ]
            torch.testing.assert_close(off, torch.tensor(wanted), rtol=1e-5, atol=1e-5)
            steps += rows
    assert steps >= (6_400 if include_prompt else 10_000)


def test_dry_follows_beams_that_change_places() -> None:
    random = Random(2)
    one, other = words(random, 60), words(random, 60)
    processor = processor_of(Dry(breakers=()), [0], [4])
    for size in range(4, 60):
        pair = [one[:size], other[:size]] if size % 3 else [other[:size], one[:size]]
        off = -process(processor, torch.tensor(pair), torch.zeros(2, VOCABULARY))
        wanted = torch.tensor([dry_brute(row[4:], 0.8, 1.75, 2) for row in pair])
        torch.testing.assert_close(off, wanted, rtol=1e-5, atol=1e-5)


def test_a_very_long_repeat_gives_no_nan() -> None:
    ids = torch.tensor([[7] * 2000])
    scores = torch.full((1, VOCABULARY), -torch.inf)
    scores[0, 7:9] = 0
    found = process(processor_of(Dry(breakers=()), [0], [0]), ids, scores)
    assert not found.isnan().any()
    assert found.argmax() == 8


def test_no_repeat_and_penalty_are_transformers_own_on_generated_tokens() -> None:
    random = Random(3)
    for _ in range(60):
        start = random.randrange(1, 9)
        rows = [words(random, start + 20) for _ in range(3)]
        ids, scores = torch.tensor(rows), torch.randn(3, VOCABULARY)
        told = call([0] * 3, [start] * 3)
        for ngram in (1, 2, 3):
            (ours,) = NoRepeat(ngram=ngram).processors(told)
            wanted = NoRepeatNGramLogitsProcessor(ngram)(ids[:, start:], scores.clone())  # pyright: ignore[reportArgumentType]
            assert torch.equal(process(ours, ids, scores), wanted)
        (ours,) = Penalty(penalty=1.3).processors(told)
        wanted = RepetitionPenaltyLogitsProcessor(1.3)(ids[:, start:], scores.clone())  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(process(ours, ids, scores), wanted)


def test_breakers_are_found_as_one_token_or_several() -> None:
    _, tokenizer = longctx.load("demo")
    found = breaker_tokens(tokenizer, ["\n", "the end of it"])
    newline: Any = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert tuple(newline) in found
    assert any(len(ids) > 1 for ids in found)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Dry(multiplier=-1), "multiplier=-1"),
        (lambda: Dry(base=0.5), "base=0.5"),
        (lambda: Dry(allowed=0), "allowed=0"),
        (lambda: Dry(breakers=("\n", "")), "empty text"),
        (lambda: UNTYPED(breakers="\n"), "tuple of texts"),
        (lambda: UNTYPED(breakers=(3,)), "tuple of texts"),
        (lambda: UNTYPED(include_prompt=1), "True or False"),
        (lambda: Dry(top_p=0.9), "temperature=0 has no effect"),
        (lambda: Dry(temperature=1, top_p=0), "top_p=0"),
        (lambda: Penalty(penalty=0.9), "penalty=0.9"),
        (lambda: Penalty(min_p=0.1, top_k=3), "top_k=3, min_p=0.1"),
        (lambda: NoRepeat(ngram=0), "ngram=0"),
        (lambda: NGRAMS(ngram=2.5), "ngram=2.5"),
    ],
)
def test_settings_are_checked(made: Any, message: str) -> None:
    with pytest.raises(RunError, match=message):
        made()


def test_breakers_without_tokens_are_refused() -> None:
    class Deaf:
        unk_token_id = 0

        def encode(self, text: str, **_: Any) -> list[int]:
            return [0] if text == "☃" else [7]

    deaf: Any = Deaf()
    with pytest.raises(DataError, match="no tokens of its own"):
        breaker_tokens(deaf, ["☃"])
    assert breaker_tokens(demo_tokenizer(), []) == ()
