"""What a report shows beside the rows of sweep.json, derived from the observations behind them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from longctx.files import finite

from ..results.reader import SweepData
from ..stats.effective_length import effective_length, pi_length, ruler_length, yarn_length
from ..stats.intervals import mean_interval, wilson
from ..tasks.shared.protocol import Observation
from .families import reads_to, worth

__all__ = [
    "cost",
    "depths",
    "effective",
    "failures",
    "headline",
    "positions",
    "repetition",
    "visible",
]

_DEPTHS = 20  # with more than this they were drawn at random, and are gathered into tenths
_EXAMPLES = 12  # failed prompts that are shown per method and task
_SAID = 80  # characters of an answer
_PER_DOUBLING = 3  # bins of loss by position
_FIRST = 16  # tokens: below, a bin would hold a handful


def headline(sweep: SweepData) -> dict[str, Any] | None:
    """How far the best method reads, against the model as it came, and at what cost.

    "Reads to" is the longest length up to which every tested one has at least 80% of the first
    answered task, or of the first whose answers have scores. The best is by `worth`.

    Returns:
        `task` (whose chart goes with it) and `text`; None where no task has answers.
    """
    scored = (name for name, task in sweep.tasks.items() if task.figure == "score")
    task = next((name for name in sweep.tasks if sweep.is_answered(name)), next(scored, None))
    if task is None:
        return None
    reached = {method: reads_to(sweep, task, method) for method in sweep.methods}
    if not any(reached.values()):
        shortest = sweep.lengths[0]
        has = "finds" if sweep.is_answered(task) else "has"
        text = f"{sweep.model} {has} less than 80% of {task} at {shortest:,} tokens already"
        return {"task": task, "text": f"{text}{', under every method' * (len(reached) > 1)}."}

    best = max(sweep.methods, key=lambda method: worth(sweep, task, method))
    row = next(row for row in sweep.cells(task, best) if row.length == reached[best])
    under = "as it came" if best == "none" else f"with {best}"
    text = f"{sweep.model} reads to {row.length:,} tokens {under}: {row.value:.0%} of {row.n}"
    if not math.isnan(row.low):
        text += f" [{row.low:.0%} to {row.high:.0%}]"
    text += f" at that length ({task})."
    if row.length == sweep.lengths[-1]:
        text += " None longer was asked."
    if best != "none" and "none" in reached:
        came = f"{reached['none']:,}" if reached["none"] else f"less than {sweep.lengths[0]:,}"
        text += f" As it came it reads to {came}. {_cost_inside(sweep, best)}"
    return {"task": task, "text": text.strip()}


def _cost_inside(sweep: SweepData, method: str) -> str:
    """The perplexity at the longest length inside the original window, with and without."""
    task = next((name for name, one in sweep.tasks.items() if one.scale == "perplexity"), None)
    inside = [length for length in sweep.lengths if length <= (sweep.original_window or 0)]
    if task is None or not inside:
        return ""
    came, now = (
        next((row.value for row in sweep.cells(task, each) if row.length == inside[-1]), math.nan)
        for each in ("none", method)
    )
    if math.isnan(came) or math.isnan(now):
        return ""
    return (
        f"At {inside[-1]:,} tokens, inside the original window, {task} is {now:.3g} where it was "
        f"{came:.3g}."
    )


def depths(sweep: SweepData, task: str, method: str) -> dict[str, Any] | None:
    """Share found by length and depth, with the Wilson interval; None where depths are not known.

    Returns:
        `depths` (labels from the beginning to the end), `lengths`, and `cells`, a row per depth:
        {n, hits, value, low, high, by} or None where nothing was asked.
    """
    groups: dict[tuple[float, int], list[Observation]] = defaultdict(list)
    wanted = [o for o in sweep.observations(task, method) if "wanted_depth" in o.detail]
    if not wanted:
        return None
    places = {float(o.detail["wanted_depth"]) for o in wanted}
    tenths = len(places) > _DEPTHS
    for observation in wanted:
        place = float(observation.detail["wanted_depth"])
        groups[min(int(place * 10), 9) / 10 if tenths else place, observation.length].append(
            observation
        )
    lengths = list(sweep.lengths)
    ordered = sorted({place for place, _ in groups})
    labels = [f"{p:.0%}–{p + 0.1:.0%}" if tenths else f"{p:.0%}" for p in ordered]
    cells = [[_cell(groups.get((place, length))) for length in lengths] for place in ordered]
    return {"method": method, "task": task, "depths": labels, "lengths": lengths, "cells": cells}


def _cell(found: Sequence[Observation] | None) -> dict[str, Any] | None:
    if not found:
        return None
    n = len(found)
    answers = [o.correct for o in found if o.correct is not None]
    if len(answers) < n:  # NaN in the logits: a share of the rest would be another figure
        return {"n": n, "hits": None, "value": None, "low": None, "high": None, "by": {}}
    hits = sum(answers)
    low, high = wilson(hits, n)
    kinds: dict[str, list[bool]] = defaultdict(list)
    for observation in found:
        kind = str(observation.detail.get("haystack", "")).partition("@")[0]
        kinds[kind].append(bool(observation.correct))
    by = {kind: [sum(right), len(right)] for kind, right in kinds.items()}
    low, high, value = round(low, 4), round(high, 4), round(hits / n, 4)  # there may be thousands
    return {"n": n, "hits": hits, "value": value, "low": low, "high": high, "by": by}


def effective(sweep: SweepData, task: str, method: str) -> dict[str, Any]:
    """How far a method reads by the fit and by three published definitions."""
    rows = [row for row in sweep.cells(task, method) if math.isfinite(row.value)]
    means = {row.length: row.value for row in rows}
    found = [o for o in sweep.observations(task, method) if o.length in means]
    fit = None
    if sweep.adaptive:  # cells stopped early are not a sample of all prompts
        means = {}
    elif found:
        fit = effective_length(
            [o.length for o in found],
            [bool(o.correct) for o in found],
            [o.cluster for o in found],
        )
    return {
        "method": method,
        "task": task,
        "window": next((row.window for row in sweep.cells(task, method)), None),
        "text": None if fit is None else str(fit),
        "tokens": None if fit is None else fit.tokens,
        "bound": None if fit is None else fit.bound,
        "low": None if fit is None else fit.low,
        "high": None if fit is None else fit.high,
        "interval": None if fit is None else fit.interval,
        "misfit_p": None if fit is None or math.isnan(fit.misfit_p) else fit.misfit_p,
        "ruler": ruler_length(means) if means else None,
        "yarn": yarn_length(means) if means else None,
        "pi": pi_length(means) if means else None,
    }


def positions(sweep: SweepData) -> dict[str, Any] | None:
    """Mean NLL by the tokens before, in bins that double; None without scores of single tokens.

    Where a position was scored in windows of several lengths, the longest counts.

    Returns:
        `window` and `lines`: {method, bins: [{first, last, tokens, documents, nll, low, high}]}.
    """
    frame: Any = sweep.token_frame()  # the stubs of pandas lose track of what a frame gives
    if frame is None:
        return None
    last = int(frame["context"].max())
    doublings = math.log2(max(last, _FIRST) / _FIRST)
    steps = np.arange(math.ceil(doublings * _PER_DOUBLING) + 1) / _PER_DOUBLING
    edges = [1, *dict.fromkeys(np.round(_FIRST * 2.0**steps).astype(int).tolist()), last + 1]
    edges = sorted(edge for edge in set(edges) if edge <= last + 1)
    lines: list[dict[str, Any]] = []
    for method in sweep.methods:
        own = frame[frame["method"] == method]
        own = own[own["length"] == own.groupby("context")["length"].transform("max")]
        bins: list[dict[str, Any]] = []
        which = np.searchsorted(edges, own["context"].to_numpy(), side="right") - 1
        for number, part in own.groupby(which):
            sums = part.groupby("document")["nll"].agg(["sum", "count"])
            mean, low, high = mean_interval(
                sums["sum"].tolist(), sums["count"].tolist(), [str(name) for name in sums.index]
            )
            place = int(number)
            bins.append(
                {
                    "first": edges[place],
                    "last": edges[place + 1] - 1,
                    "tokens": len(part),
                    "documents": len(sums),
                    "nll": finite(mean),
                    "low": finite(low),
                    "high": finite(high),
                }
            )
        if bins:
            lines.append({"method": method, "bins": bins})
    return {"window": sweep.original_window, "lines": lines}


def repetition(sweep: SweepData) -> dict[str, Any] | None:
    """Means by method and length of every number in the details of tasks that measure repetition.

    Returns:
        `metrics` (names) and `rows`: {method, length, n, values: {name: [mean, observations]}}. A
        metric is averaged over the observations that have it (a text without a loop has no onset).
    """
    rows: list[dict[str, Any]] = []
    metrics: dict[str, None] = {}
    tasks = [name for name, task in sweep.tasks.items() if task.figure == "seq_rep_4"]
    for task, method in product(tasks, sweep.methods):
        groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for observation in sweep.observations(task, method):
            groups[observation.length].append(observation.detail)
        for length, details in sorted(groups.items()):
            values: dict[str, list[float]] = defaultdict(list)
            for detail in details:
                for name, value in detail.items():
                    if _is_metric(name, value):
                        values[name].append(float(value))
            metrics.update(dict.fromkeys(values))
            means = {name: [math.fsum(v) / len(v), len(v)] for name, v in values.items()}
            rows.append({"method": method, "length": length, "n": len(details), "values": means})
    return {"metrics": list(metrics), "rows": rows} if rows else None


def _is_metric(name: str, value: Any) -> bool:
    """Seeds and places in a document are numbers that have no mean worth reading."""
    number = isinstance(value, (int, float, bool)) and math.isfinite(value)
    return number and name not in ("seed", "start", "end", "index")


def failures(sweep: SweepData, task: str, method: str) -> dict[str, Any] | None:
    """Prompts that were answered wrongly, evenly over all of them; None where there are none."""
    wrong = [o for o in sweep.observations(task, method) if o.correct is False]
    wrong.sort(key=lambda o: (o.length, o.detail.get("wanted_depth") or 0.0))
    if not wrong:
        return None
    count = min(_EXAMPLES, len(wrong))
    shown = [wrong[i * len(wrong) // count] for i in range(count)]
    return {
        "method": method,
        "task": task,
        "failed": len(wrong),
        "asked": len(sweep.observations(task, method)),
        "examples": [
            {
                "length": o.length,
                "depth": o.detail.get("depth"),
                "haystack": _answer(o.detail.get("haystack")),
                "key": _answer(o.detail.get("key")),
                "said": _answer(o.detail.get("said", o.detail.get("argmax"))),
            }
            for o in shown
        ],
    }


def _answer(text: Any) -> str:
    if text is None:
        return "–"
    shown = visible(text)
    return shown if len(shown) <= _SAID else f"{shown[:_SAID]}…"


def visible(text: object) -> str:
    """The text with what is not printable (line ends, controls of direction) as its escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def cost(sweep: SweepData, task: str, method: str) -> dict[str, Any]:
    """Tokens forwarded and seconds, summed over the rows, and how prompts were run."""
    rows = sweep.cells(task, method)
    records = [r for r in sweep.records or () if (r.task, r.method) == (task, method)]
    return {
        "method": method,
        "task": task,
        "tokens": sum(row.tokens for row in rows),
        "seconds": math.fsum(row.seconds for row in rows),
        "how": list(dict.fromkeys(record.how for record in records)),
    }
