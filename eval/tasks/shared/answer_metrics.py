"""How good a free answer is, beside several right ones: the best of them counts.

Sources: Rajpurkar et al., "SQuAD" (arXiv:1606.05250), section 6.1, for F1, exact match and what
both disregard; Lin, "ROUGE" (2004), for ROUGE-L, computed by the package `rouge-score`; Kuratov et
al., "BABILong" (arXiv:2406.10149), for answers that contain the right one.
"""

from __future__ import annotations

import importlib.util
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

from longctx.errors import DataError

__all__ = ["METRICS", "Metric", "answer_score", "check_answer", "check_metric", "normalised"]

Metric = Literal["f1", "rouge_l", "exact_match", "contains"]
METRICS: tuple[Metric, ...] = get_args(Metric)


def check_metric(metric: str, where: str) -> None:
    """Refuse a metric that is not one, or cannot be computed here (DataError)."""
    if metric not in METRICS:
        raise DataError(f"{where}: {metric!r} is not a metric: expected {', '.join(METRICS)}.")
    if metric == "rouge_l" and importlib.util.find_spec("rouge_score") is None:
        raise DataError(
            f"{where}: rouge_l needs rouge-score: pip install 'longctx-toolkit[rouge]'."
        )


def check_answer(metric: Metric, answer: str, where: str) -> None:
    """Refuse a right answer that no text can reach (DataError)."""
    if metric == "rouge_l" and re.search("[a-z0-9]", answer.lower()) is None:
        raise DataError(
            f"{where}: rouge_l compares words of a–z and digits alone, and {answer!r:.40} has "
            "none, so that every answer would score 0: take contains or exact_match."
        )


def normalised(text: str) -> str:
    """What SQuAD compares: lower case, without punctuation, articles and further spaces.

    >>> normalised("The  Eiffel-Tower, a sight.")
    'eiffeltower sight'
    """
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def answer_score(metric: Metric, text: str, answers: Sequence[str]) -> float:
    """The score of a text, 0 to 1: the best over the answers.

    >>> round(answer_score("f1", "It is the red house.", ["red house", "blue"]), 3)
    0.667
    """
    return max(_score(metric, text, answer) for answer in answers)


def _score(metric: Metric, text: str, answer: str) -> float:
    if metric == "contains":
        return float(answer.strip().lower() in text.lower())
    if metric == "rouge_l":
        return float(_rouge().score(answer, text)["rougeL"].fmeasure)
    if metric == "exact_match":
        return float(normalised(text) == normalised(answer))
    said, right = normalised(text).split(), normalised(answer).split()
    if not said or not right:  # an answer of nothing but articles: all or nothing, as in SQuAD 2
        return float(said == right)
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right))


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score import rouge_scorer  # pyright: ignore[reportMissingImports]

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
