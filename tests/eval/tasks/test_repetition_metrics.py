"""Repetition metrics against examples worked by hand, and their properties."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import DataError
from longctx.eval.tasks.repetition_metrics import (
    distinct_n,
    diversity,
    loop_onset,
    rep_l,
    seq_rep_n,
    uniq,
)

sequences = st.lists(st.integers(0, 5), max_size=60)


def test_seq_rep_n_by_hand() -> None:
    # 1-2-3-4, 2-3-4-1, 3-4-1-2, 4-1-2-3, 1-2-3-4: five 4-grams, four of them unique
    assert seq_rep_n([1, 2, 3, 4, 1, 2, 3, 4], 4) == pytest.approx(1 / 5)
    # the repeat is the very last n-gram, which the well-known implementations drop
    assert seq_rep_n([7, 8, 9, 7, 8], 2) == pytest.approx(1 / 4)
    assert seq_rep_n([1] * 10, 4) == pytest.approx(6 / 7)
    assert seq_rep_n([1, 2, 3], 4) == 0.0
    assert seq_rep_n([], 1) == 0.0
    assert seq_rep_n([3], 1) == 0.0


def test_diversity_by_hand() -> None:
    # 2-grams ab ba ab ba: 2 of 4; 3-grams aba bab aba: 2 of 3; 4-grams abab baba: 2 of 2
    assert diversity([1, 2, 1, 2, 1]) == pytest.approx(1 / 2 * 2 / 3 * 1)
    assert diversity([]) == 1.0


def test_rep_by_hand() -> None:
    context, predicted = [1, 2, 3, 1], [1, 9, 2, 3]
    # 1 after [1] yes; 9 after [1 2] no; 2 after [2 3] yes; 3 after [3 1] yes
    assert rep_l(predicted, context, 2) == pytest.approx(3 / 4)
    assert rep_l(predicted, context, 1) == pytest.approx(1 / 4)
    assert rep_l([], [], 4) == 0.0


def test_unique_counts() -> None:
    assert uniq([1, 1, 2]) == 2
    assert uniq([]) == 0


@pytest.mark.parametrize(
    ("tokens", "repeats", "onset"),
    [
        ([5, 9, 1, 2, 1, 2, 1, 2], 3, 2),
        ([5, 9, 2, 1, 2, 1, 2, 1, 2], 3, 2),  # the period holds one token earlier already
        ([1, 2, 1, 2, 1], 3, None),  # two and a half copies
        ([1, 2, 1, 2, 1], 2, 0),
        ([7, 7, 7], 3, 0),
        ([7, 7], 3, None),
        ([1, 1, 1, 2], 3, None),  # a loop that was left again
        ([], 2, None),
        ([4], 2, None),
    ],
)
def test_loop_onset_by_hand(tokens: list[int], repeats: int, onset: int | None) -> None:
    assert loop_onset(tokens, repeats) == onset


@given(sequences, st.integers(1, 5), st.integers(0, 9))
def test_bounds_and_renaming(tokens: list[int], n: int, seed: int) -> None:
    assert 0.0 <= seq_rep_n(tokens, n) < 1.0
    assert 0.0 < distinct_n(tokens, n) <= 1.0
    assert 0.0 < diversity(tokens) <= 1.0
    names = list(range(6))
    random.Random(seed).shuffle(names)
    renamed = [names[token] for token in tokens]
    assert seq_rep_n(renamed, n) == seq_rep_n(tokens, n)
    assert loop_onset(renamed) == loop_onset(tokens)
    assert uniq(renamed) == uniq(tokens)


@given(sequences.filter(len))
def test_order_does_not_matter_to_unigrams(tokens: list[int]) -> None:
    assert seq_rep_n(sorted(tokens), 1) == seq_rep_n(tokens, 1)
    assert math.isclose(distinct_n(tokens, 1), uniq(tokens) / len(tokens))


@given(sequences, st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(2, 4))
def test_a_loop_that_is_built_is_found(head: list[int], body: list[int], copies: int) -> None:
    tokens = head + body * copies
    onset = loop_onset(tokens, copies)
    assert onset is not None
    period = next(
        p
        for p in range(1, 7)
        if all(tokens[i] == tokens[i + p] for i in range(onset, len(tokens) - p))
    )
    assert len(tokens) - onset >= copies * period
    assert onset == 0 or tokens[onset - 1] != tokens[onset - 1 + period]


@given(sequences, st.integers(1, 70))
def test_looking_further_back_finds_no_less(context: list[int], l: int) -> None:  # noqa: E741
    predicted = context[::-1]
    assert rep_l(predicted, context, l) <= rep_l(predicted, context, l + 1)


def test_bad_arguments() -> None:
    with pytest.raises(DataError, match="n=0"):
        seq_rep_n([1], 0)
    with pytest.raises(DataError, match="2 predictions, 1 context"):
        rep_l([1, 2], [1], 1)
    with pytest.raises(DataError, match="l=0"):
        rep_l([1], [1], 0)
    with pytest.raises(DataError, match="repeats=1"):
        loop_onset([1, 1], 1)
