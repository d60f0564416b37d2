"""Sweeps side by side: what does each entry change against the first, on the same inputs?

comparison = compare({"base": "runs/base", "yarn": "runs/yarn#yarn:4"})
print_comparison(comparison); write_comparison(comparison, "runs/base-yarn")

Observations are paired by task, settings, length and item. Holm's adjustment is over all cells of
one entry, so that its marks hold together; pooled tests are a family of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from longctx.errors import RunError
from longctx.fingerprint import json_digest

from ..stats.paired_tests import holm
from .comparison import ComparedCell, ComparedTask, Comparison, PooledDifference
from .differences import (
    Difference,
    Interval,
    Pair,
    answers_in_a_cell,
    check_interval,
    nll,
    pair,
    pooled_answers,
    shares,
)
from .entries import Entry, Source, entries_of

__all__ = ["compare"]

_LEVEL = 0.05  # adjusted p-values below it are called significant
_Key: TypeAlias = tuple[str, int, str]
_Tested = TypeVar("_Tested", ComparedCell, PooledDifference)


def compare(runs: Mapping[str, Source], *, interval: Interval = "t") -> Comparison:
    """Compare sweeps with each other, cell by cell and pooled, on the inputs they share.

    Args:
        runs: by name, each a folder that `longctx sweep --out` wrote, "FOLDER#METHOD" for one of
            its methods, or a `SweepResult`. A run of several methods gives an entry for each,
            `name/method`; of a single run its methods are compared. The first is the baseline.
        interval: of the differences; see `differences.Interval`. Tests are the same under both.

    Raises:
        RunError: fewer than two entries, folders that hold no sweep, other tokenizers or task
            settings, or nothing in common.
    """
    check_interval(interval)
    entries = entries_of(runs)
    if len(entries) < 2:
        raise RunError(
            f"a comparison takes two entries or more, here are {len(entries)}: name another run, "
            "or one of several methods."
        )
    _refuse_unlike(entries)
    tasks = tuple(
        _task(name, entries, interval)
        for name in dict.fromkeys(t for e in entries for t in e.sweep.tasks)
    )
    lengths = tuple(sorted({length for entry in entries for length in entry.sweep.lengths}))
    pairs = {
        (task.name, length, entry.name): _pairs(entries[0], entry, task, length)
        for task in tasks
        for length in lengths
        for entry in entries[1:]
    }
    rows = [
        _cell(entry, task, length, pairs.get((task.name, length, entry.name)))
        for task in tasks
        for length in lengths
        for entry in entries
    ]
    if not any(row.paired or row.failed for row in rows):
        reasons = dict.fromkeys(row.unpaired for row in rows if row.unpaired)
        raise RunError(
            f"the runs have nothing in common: {'; '.join(map(str, reasons))}. Sweep the same "
            "tasks, texts and lengths in both."
        )
    window = entries[0].sweep.original_window
    short = [length for length in lengths if window is not None and length <= window]
    return Comparison(
        baseline=entries[0].name,
        entries=tuple(entry.name for entry in entries),
        models={entry.name: f"{entry.sweep.model} {entry.method}" for entry in entries},
        original_window=window,
        lengths=lengths,
        tasks=tasks,
        rows=tuple(_adjusted(rows)),
        pooled=tuple(_adjusted(_pool(tasks, entries, lengths, pairs))),
        inside=tuple(_adjusted(_pool(tasks, entries, short, pairs))),
        notes=tuple(
            dict.fromkeys([*_other_texts(entries), *(n for e in entries for n in e.notes)])
        ),
    )


def _refuse_unlike(entries: Sequence[Entry]) -> None:
    """Different models are the point; different prompts are not."""
    base = entries[0]
    for entry in entries:
        if entry.sweep.adaptive is not None:
            raise RunError(
                f"{entry.name} is of an adaptive sweep, which asked each cell only until it was "
                "decided: tests of differences take a number of prompts that was fixed before. "
                "Sweep both without --adaptive."
            )
    tokenizer, template = (base.sweep.identity.get(key) for key in ("tokenizer", "chat template"))
    for entry in entries[1:]:
        own, tasks = entry.sweep.identity, entry.sweep.tasks
        if own["tokenizer"] != tokenizer:
            raise RunError(
                f"{base.name} and {entry.name} have different tokenizers ({tokenizer} "
                f"and {own['tokenizer']}), so that no prompt is the same: compare runs of one "
                "tokenizer."
            )
        if own.get("chat template") != template:
            for task in tasks.keys() & base.sweep.tasks.keys():
                if base.sweep.tasks[task].cache_key.get("chat", False) is not False:
                    raise RunError(
                        f"{base.name} and {entry.name} have different chat templates, so that no "
                        f"prompt of {task} is the same: sweep both with chat=False (--chat False), "
                        "or give both tokenizers one template."
                    )
        for other in entries[: entries.index(entry)]:
            for task in tasks.keys() & other.sweep.tasks.keys():
                one, two = other.sweep.tasks[task].cache_key, tasks[task].cache_key
                if json_digest(one) != json_digest(two):
                    raise RunError(
                        f"{other.name} and {entry.name} have different settings of {task}: "
                        f"{_unlike(one, two)}. Sweep both alike."
                    )


def _other_texts(entries: Sequence[Entry]) -> list[str]:
    """Tasks whose figures are over other inputs in one entry than in the baseline."""
    base, before = entries[0], entries[0].sweep.tasks
    return [
        f"{task} of {entry.name} and of {base.name} is over other windows or texts: the values are "
        "of all of them, the difference of those that both have"
        for entry in entries[1:]
        for task, settings in before.items()
        if task in entry.sweep.tasks
        and json_digest(settings.report_identity)
        != json_digest(entry.sweep.tasks[task].report_identity)
    ]


def _unlike(first: dict[str, Any], second: dict[str, Any]) -> str:
    said = [
        f"{key} {first.get(key)!r} and {second.get(key)!r}"
        for key in dict.fromkeys([*first, *second])
        if json_digest(first.get(key)) != json_digest(second.get(key))
    ]
    return ", ".join(said)


def _task(name: str, entries: Sequence[Entry], interval: Interval) -> ComparedTask:
    has = [entry.sweep for entry in entries if name in entry.sweep.tasks]
    answered = any(sweep.is_answered(name) for sweep in has)
    task = has[0].tasks[name]
    return ComparedTask(
        name=name,
        scale=task.scale,
        higher_is_better=task.higher_is_better,
        answered=answered,
        estimand=task.estimand,
        interval=interval,
        figure=next((f for sweep in has if (f := sweep.tasks[name].figure)), None),
    )


def _pairs(base: Entry, entry: Entry, task: ComparedTask, length: int) -> list[Pair] | str:
    """What both have of a cell, or why that is nothing."""
    place = task.name, length
    for side in (entry, base):
        cell = side.cells.get(place)
        if cell is None or not (cell.row.n or cell.row.failed):
            return f"not measured in {side.name}"
        if cell.row.failed:
            return f"{side.name} failed: {cell.row.failed}"
        if cell.mismatch:
            return (
                f"results.jsonl of {side.name} holds {cell.mismatch}: finish it by the same "
                "`longctx sweep` command, or sweep into a new folder"
            )
    found = pair(base.cells[place].observations, entry.cells[place].observations)
    if task.kind == "perplexity":
        found = [both for both in found if both[0].targets]  # a window may hold no key token
    if task.kind == "share" and not all(task.figure in o.detail for both in found for o in both):
        return f"{task.name} has no figure for each prompt: its values stand side by side"
    return found or f"no prompt or window in common with {base.name}: other texts or lengths"


def _difference(
    task: ComparedTask,
    pairs: Sequence[Pair],
    answers: Callable[[Sequence[Pair], Interval], Difference],
) -> Difference:
    """Of the task's kind of figure; `answers` compares right answers."""
    if task.kind == "answers":
        return answers(pairs, task.interval)
    if task.kind == "perplexity":
        return nll(pairs, task.interval)
    assert task.figure is not None, "cells without are not paired"
    return shares(pairs, task.figure, task.interval)


def _cell(
    entry: Entry, task: ComparedTask, length: int, pairs: list[Pair] | str | None
) -> ComparedCell:
    """A row; `pairs` is None for the baseline, which is compared with nothing."""
    cell = entry.cells.get((task.name, length))
    row = None if cell is None else cell.row
    found, unpaired = None, None
    if isinstance(pairs, str):
        unpaired = pairs
    elif pairs is None:
        measured = row is not None and bool(row.n or row.failed)
        unpaired = None if measured else f"not measured in {entry.name}"
    else:
        found = _difference(task, pairs, answers_in_a_cell)
    return ComparedCell(
        task=task.name,
        length=length,
        entry=entry.name,
        value=row.value if row else math.nan,
        low=row.low if row else math.nan,
        high=row.high if row else math.nan,
        n=row.n if row else 0,
        difference=found.value if found else math.nan,
        difference_low=found.low if found else math.nan,
        difference_high=found.high if found else math.nan,
        interval=found.interval if found else "",
        p_value=found.p_value if found else math.nan,
        p_holm=math.nan,
        test=found.test if found else "",
        paired=found.pairs if found else 0,
        significant=False,
        failed=row.failed if row else None,
        unpaired=unpaired,
    )


def _pool(
    tasks: Sequence[ComparedTask],
    entries: Sequence[Entry],
    lengths: Sequence[int],
    pairs: Mapping[_Key, list[Pair] | str],
) -> list[PooledDifference]:
    """All pairs of these lengths together, for each task and entry that has some."""
    pooled: list[PooledDifference] = []
    for task in tasks:
        for entry in entries[1:]:
            found = {n: pairs[task.name, n, entry.name] for n in lengths}
            used = {n: these for n, these in found.items() if not isinstance(these, str)}
            if not used:
                continue
            together = [one for these in used.values() for one in these]
            difference = _difference(task, together, pooled_answers)
            left_out = tuple(n for n in lengths if n not in used)
            pooled.append(_pooled(task.name, entry.name, tuple(used), left_out, difference))
    return pooled


def _pooled(
    task: str,
    entry: str,
    lengths: tuple[int, ...],
    left_out: tuple[int, ...],
    found: Difference,
) -> PooledDifference:
    return PooledDifference(
        task=task,
        entry=entry,
        lengths=lengths,
        left_out=left_out,
        difference=found.value,
        low=found.low,
        high=found.high,
        interval=found.interval,
        p_value=found.p_value,
        p_holm=math.nan,
        test=found.test,
        smallest_p=found.smallest_p,
        paired=found.pairs,
        clusters=found.clusters,
        significant=False,
    )


def _adjusted(tested: Sequence[_Tested]) -> list[_Tested]:
    """The same after Holm, a family per entry; what has no p-value is in none."""
    adjusted = list(tested)
    for entry in dict.fromkeys(one.entry for one in tested):
        family = [
            place
            for place, one in enumerate(tested)
            if one.entry == entry and not math.isnan(one.p_value)
        ]
        for place, p in zip(family, holm([tested[i].p_value for i in family]), strict=True):
            adjusted[place] = dataclasses.replace(tested[place], p_holm=p, significant=p < _LEVEL)
    return adjusted
