"""How repetitive a sequence of tokens is, by the papers' definitions.

All take sequences of token ids. An n-gram is counted at every place it stands, the last included:
both well-known implementations of seq-rep-n drop that one.

Sources: Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training"
(arXiv:1908.04319), section 6 (rep/l, uniq, seq-rep-n); Li et al. 2016 (arXiv:1510.03055),
section 5 (distinct-n); Su et al. 2022, SimCTG (arXiv:2202.06417), section 5 (diversity).
"""

from __future__ import annotations

from collections.abc import Sequence

from longctx.errors import DataError

__all__ = [
    "distinct_n",
    "diversity",
    "loop_onset",
    "rep_l",
    "seq_rep_n",
    "uniq",
    "wrep_l",
]


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    if n < 1:
        raise DataError(f"n={n} is not a length of an n-gram: expected 1 or more.")
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def seq_rep_n(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that stood before: 1 − unique / all. 0 for a sequence shorter than n.

    >>> seq_rep_n([1, 2, 1, 2, 1], n=2)
    0.5
    """
    grams = _ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_n(tokens: Sequence[int], n: int) -> float:
    """Unique n-grams per n-gram, 1 for a sequence shorter than n (nothing repeats)."""
    return 1.0 - seq_rep_n(tokens, n)


def diversity(tokens: Sequence[int]) -> float:
    """Product of distinct-n over n = 2, 3, 4: 1 without any repetition."""
    return distinct_n(tokens, 2) * distinct_n(tokens, 3) * distinct_n(tokens, 4)


def uniq(tokens: Sequence[int]) -> int:
    """Number of different tokens."""
    return len(set(tokens))


def rep_l(predicted: Sequence[int], context: Sequence[int], l: int) -> float:  # noqa: E741
    """Share of next-token predictions that occur among the `l` tokens before them.

    Args:
        predicted: the argmax at each place; `predicted[t]` follows `context[t]`.
        context: the tokens read, as many as predictions.
        l: how many tokens back count as recent, the last one read included.

    Raises:
        DataError: the lengths differ, or l is below 1.
    """
    recent = _recent(predicted, context, l)
    return sum(recent) / len(recent) if recent else 0.0


def wrep_l(
    predicted: Sequence[int],
    context: Sequence[int],
    targets: Sequence[int],
    l: int,  # noqa: E741
) -> float:
    """Share of next-token predictions that occur among the `l` tokens before them and are wrong.

    Args:
        predicted: as for `rep_l`.
        context: as for `rep_l`.
        targets: the tokens that really follow, as many.
        l: as for `rep_l`.

    Raises:
        DataError: the lengths differ, or l is below 1.
    """
    if len(targets) != len(predicted):
        raise DataError(f"{len(predicted)} predictions, {len(targets)} targets: expected equal.")
    recent = _recent(predicted, context, l)
    wrong = [r and p != right for r, p, right in zip(recent, predicted, targets, strict=True)]
    return sum(wrong) / len(wrong) if wrong else 0.0


def _recent(predicted: Sequence[int], context: Sequence[int], l: int) -> list[bool]:  # noqa: E741
    if len(predicted) != len(context):
        raise DataError(
            f"{len(predicted)} predictions, {len(context)} context tokens: expected equal."
        )
    if l < 1:
        raise DataError(f"l={l} looks at nothing: expected 1 or more.")
    return [p in context[max(0, t + 1 - l) : t + 1] for t, p in enumerate(predicted)]


def loop_onset(tokens: Sequence[int], repeats: int = 3) -> int | None:
    """Where a sequence begins to loop for good, None if it does not.

    The tail loops if it ends in `repeats` copies of the same tokens; of the periods that fit, the
    smallest counts. The onset is the first token from which that period holds to the end.

    >>> loop_onset([5, 9, 1, 2, 1, 2, 1, 2])
    2

    Raises:
        DataError: repeats is below 2 (one copy is not a loop).
    """
    if repeats < 2:
        raise DataError(f"repeats={repeats}: a loop takes at least 2 copies.")
    length = len(tokens)
    for period in range(1, length // repeats + 1):
        onset = length - period
        while onset > 0 and tokens[onset - 1] == tokens[onset - 1 + period]:
            onset -= 1
        if length - onset >= repeats * period:
            return onset
    return None
