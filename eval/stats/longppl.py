"""Perplexity over the tokens that a long context helps with, and NLL by position.

Most tokens of a text are as easy without what stands far before them, and perplexity is a mean over
all. LongPPL takes the key tokens only: those whose log-probability under an evaluator gains more
than `gain` nats from the long context (log p(x | long) − log p(x | short)) and exceeds `floor` with
it. Every model is scored on the same ones.

As a task of a sweep, with an evaluator of its own, it is `longppl` (eval/tasks/longppl.py). Here
the keys come from a sweep's scores, and one set of keys is scored at several lengths; in Python:

    from longctx.eval import Perplexity, key_tokens, long_ppl, sweep

    result = sweep(model, tokenizer, [Perplexity(stride=32)], "1k:16k", methods=..., results=...)
    tokens = result.per_token()
    keys = key_tokens(tokens, evaluator="none", long=16384, short=1024)
    long_ppl(tokens, keys)

The paper's evaluator is a strong model of its own (its key tokens come from contexts of up to 32k
against 4k tokens). An evaluator that is among the methods compared is flattered: its keys are
tokens that it does well on at `long`. Read its own row with that in mind.

Source: Fang et al. 2024, "What is Wrong with Perplexity for Long-context Language Modeling?"
(arXiv:2410.23771), section 3; both thresholds as there, strict.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from longctx.errors import RunError, nearest

from .intervals import mean_interval, perplexity_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["is_key", "key_tokens", "long_ppl", "position_curve"]

_TARGET = ["document", "index"]


def is_key(long: Any, short: Any, alpha: float, beta: float) -> Any:
    """Whether log p(x | long) − log p(x | short) > α and log p(x | long) > β, element by element.

    Args:
        long: log-probabilities with the long context, a tensor or a series.
        short: with the short context.
        alpha: α.
        beta: β.
    """
    return (long - short > alpha) & (long > beta)


def key_tokens(
    tokens: pd.DataFrame,
    *,
    evaluator: str,
    long: int,
    short: int,
    gain: float = 2.0,
    floor: float = -2.0,
) -> pd.DataFrame:
    """Choose the key tokens: document, index, token, and their log-probability long and short.

    Args:
        tokens: from `SweepResult.per_token`, where the same tokens were scored at both lengths
            (`Perplexity(stride=…)`).
        evaluator: the method whose scores choose, as the sweep labels it.
        long: length in tokens of the long context.
        short: length in tokens of the short context.
        gain: nats that the log-probability gains from the long context, more than.
        floor: log-probability with the long context, more than.

    Raises:
        RunError: a method or length that was not scored, lengths that share no target, or no token
            that is a key.
    """
    if short >= long:
        raise RunError(f"short={short}, long={long}: expected the short context to be shorter.")
    found = _of(tokens, "method", evaluator)
    by_length = {n: _once(_of(found, "length", n)) for n in (long, short)}
    both: Any = by_length[long].merge(by_length[short], on=_TARGET, suffixes=("", "_short"))
    if both.empty:
        raise RunError(
            f"lengths {long} and {short} share no scored token: sweep Perplexity(stride=…), which "
            "scores the same ones at every length."
        )
    if (both["token"] != both["token_short"]).any():
        raise RunError("one document and index holds two tokens: these are scores of two texts.")
    both["log_p"], both["log_p_short"] = -both["nll"], -both["nll_short"]
    keys: Any = both[is_key(both["log_p"], both["log_p_short"], gain, floor)]
    if keys.empty:
        best = float((both["log_p"] - both["log_p_short"]).max())
        raise RunError(
            f"none of {len(both)} tokens is a key: under {evaluator!r} the most that one gains "
            f"from {long} tokens against {short} is {best:.2f} nats, wanted are more than {gain:g} "
            f"and a log-probability above {floor:g}. Score more text, or lower `gain`."
        )
    return keys[[*_TARGET, "token", "log_p", "log_p_short"]].reset_index(drop=True)


def long_ppl(tokens: pd.DataFrame, keys: pd.DataFrame) -> pd.DataFrame:
    """Perplexity over the key tokens, a row for each method and length.

    Columns: method, length, value, low, high (t over documents, 95%; NaN where fewer than three
    hold all keys), keys, documents, targets (all that were scored) and share (keys of those
    targets).

    Args:
        tokens: from `SweepResult.per_token`; of other models too, if their tokenizer is the same.
        keys: from `key_tokens`.

    Raises:
        RunError: no keys, or a method and length at which some key was not scored.
    """
    import pandas as pd

    if keys.empty:
        raise RunError("no key tokens: choose some with key_tokens(…).")
    rows: list[dict[str, Any]] = []
    for (method, length), cell in _cells(tokens, ["method", "length"]):
        cell = _once(cell)
        chosen = cell.merge(keys[[*_TARGET, "token"]], on=[*_TARGET, "token"])
        if len(chosen) < len(keys):
            raise RunError(
                f"{method!r} at {length} lacks {len(keys) - len(chosen)} of {len(keys)} keys: the "
                "same tokens must be scored at every length (Perplexity(stride=…))."
            )
        mean, low, high = _mean_nll(chosen)
        rows.append({
            "method": method,
            "length": int(length),
            "value": perplexity_of(mean),
            "low": perplexity_of(low),
            "high": perplexity_of(high),
            "keys": len(chosen),
            "documents": chosen["document"].nunique(),
            "targets": len(cell),
            "share": len(chosen) / len(cell),
        })  # fmt: skip
    return pd.DataFrame(rows)


def position_curve(tokens: pd.DataFrame, bins: int | Sequence[int] = 16) -> pd.DataFrame:
    """Mean NLL by how many tokens stand before, a row for each method, length and bin.

    Columns: method, length, start and end of the bin (tokens of context, end excluded), nll in
    nats, low, high (t over documents, 95%), targets, documents. Empty bins have no row.

    Args:
        tokens: from `SweepResult.per_token`.
        bins: so many of equal width over the contexts that there are, or their edges.

    Raises:
        RunError: no tokens, fewer than one bin, or edges that do not ascend.
    """
    import pandas as pd

    if tokens.empty:
        raise RunError("no scored tokens: sweep 'perplexity' with a results file.")
    edges = _edges(tokens, bins)
    place = pd.cut(tokens["context"], edges, right=False, labels=False)
    rows: list[dict[str, Any]] = []
    for (method, length, number), cell in _cells(
        tokens.assign(bin=place).dropna(subset=["bin"]), ["method", "length", "bin"]
    ):
        mean, low, high = _mean_nll(cell)
        rows.append({
            "method": method,
            "length": int(length),
            "start": edges[int(number)],
            "end": edges[int(number) + 1],
            "nll": mean,
            "low": low,
            "high": high,
            "targets": len(cell),
            "documents": cell["document"].nunique(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _edges(tokens: pd.DataFrame, bins: int | Sequence[int]) -> list[int]:
    if isinstance(bins, int):
        if bins < 1:
            raise RunError(f"bins={bins}: expected at least one.")
        context: Any = tokens["context"]
        first, last = int(context.min()), int(context.max()) + 1
        count = min(bins, last - first)  # whole tokens: no bin is narrower
        return [first + (last - first) * i // count for i in range(count + 1)]
    edges = list(bins)
    if len(edges) < 2 or any(b <= a for a, b in pairwise(edges)):
        raise RunError(f"bins={edges}: expected two or more edges, each above the last.")
    return edges


def _of(tokens: pd.DataFrame, column: str, wanted: str | int) -> pd.DataFrame:
    """The rows of a method or length, which must be there."""
    found: Any = tokens[tokens[column] == wanted]
    if found.empty:
        there = sorted(tokens[column].unique())
        hint = nearest(str(wanted), map(str, there)) if column == "method" else ""
        raise RunError(
            f"no token is scored with {column} {wanted!r}{hint} (there: "
            f"{', '.join(map(str, there)) or 'none'})."
        )
    return found


def _once(tokens: pd.DataFrame) -> pd.DataFrame:
    if tokens.duplicated(_TARGET).any():
        raise RunError(
            "a token is scored twice for one method and length: pass the scores of one sweep."
        )
    return tokens


def _cells(tokens: pd.DataFrame, by: list[str]) -> list[tuple[Any, pd.DataFrame]]:
    """Groups, sorted."""
    return list(tokens.groupby(by, observed=True))


def _mean_nll(tokens: pd.DataFrame) -> tuple[float, float, float]:
    """Mean NLL of tokens and its interval, with documents as the independent units."""
    nll: list[float] = tokens["nll"].astype(float).tolist()
    documents: list[str] = tokens["document"].tolist()
    return mean_interval(nll, [1.0] * len(nll), documents)
