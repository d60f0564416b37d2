"""The loop guard: no r copies of a stretch of tokens at the end of what is generated.

A row loops with period p when its last max(copies · p, min_length) generated tokens repeat every p.
For each p the tokens that agree with the one p before them are counted at the tail,

    run'[p] = (x[t] = x[t − p]) · (run[p] + 1),   a loop when run[p] ≥ needed(p) − p

"ban" forbids the token that would complete a loop: a hard guarantee, but the model goes on around
it. "mend" lets the loop come, cuts the row to one copy and goes on from there with a temperature
that rises from try to try, and with the first settings again after `recover_after` tokens: twice as
many at each further place, since a loop that comes again shows that they came back too early.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..errors import LongctxError, RunError, nearest
from ..registry import parse_fields
from .checks import check_number, check_whole
from .decoding import Call, same_start

__all__ = ["BanProcessor", "LoopGuard", "LoopTracker", "parse_guard"]

_LONGEST = 65_536  # tokens of a period: each step compares as many
_MODES = ("ban", "mend")
_STRATEGIES = ("resample", "split", "marker")


@dataclass(frozen=True, slots=True)
class LoopGuard:
    """When a row loops, and what is done then."""

    mode: Literal["ban", "mend"] = "mend"
    """"ban": no loop is ever completed. "mend": cut to one copy, and go on with draws."""
    copies: int = 3
    """Copies of a stretch that make a loop."""
    max_period: int = 128
    """Tokens of the longest stretch that is looked for."""
    min_length: int = 12
    """Tokens of the shortest loop: shorter ones (three dots, a key of equal digits) are text."""
    temperature: float = 1.0
    """Mend: added to the decoding's own for the first try at one place; half of it more for each
    further one."""
    min_p: float = 0.05
    """Mend: tries draw among tokens at least this share as likely as the likeliest."""
    retries: int = 4
    """Mend: tries at one place, after which the row ends with the reason "loop"."""
    recover_after: int = 32
    """Mend: tokens after a row's first cut that are drawn warmer; twice as many at each new place.
    A loop that many tokens beyond a cut is at a new place."""
    strategy: Literal["resample", "split", "marker"] = "resample"
    """Mend: what a try begins with, beside the warmer draws, which all have: nothing, the text
    `split_with` (a new paragraph), or `marker`."""
    split_with: str = "\n\n"
    """What ends the sentence for `split`."""
    marker: str = " * "
    """The special characters that `marker` puts into the text."""

    def __post_init__(self) -> None:
        for field, known in (("mode", _MODES), ("strategy", _STRATEGIES)):
            value: Any = getattr(self, field)
            if value not in known:
                raise RunError(
                    f"guard: {field}={value!r}{nearest(value, known)}: expected one of "
                    f"{', '.join(known)}."
                )
        check_whole("guard", "copies", self.copies, least=2, most=_LONGEST)
        check_whole("guard", "max_period", self.max_period, least=1, most=_LONGEST)
        for field in ("min_length", "retries", "recover_after"):
            check_whole("guard", field, getattr(self, field), least=1)
        check_number("guard", "temperature", self.temperature, least=0, most=1000, above=True)
        check_number("guard", "min_p", self.min_p, least=0, most=1)
        for field in ("split_with", "marker"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value:
                raise RunError(f"guard: {field}={value!r}: expected a text that is not empty.")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        own = {"split_with": "split", "marker": "marker"}
        idle = [
            field
            for field in ("temperature", "min_p", "retries", "recover_after", "strategy", *own)
            if getattr(self, field) != defaults[field]
            and (self.mode == "ban" or own.get(field, self.strategy) != self.strategy)
        ]
        if idle:
            raise RunError(
                f"guard: {idle[0]}={getattr(self, idle[0])!r} has no effect with mode="
                f"{self.mode!r} and strategy={self.strategy!r}: leave it out."
            )

    @property
    def inserted(self) -> str:
        """The text that a try begins with."""
        return {"split": self.split_with, "marker": self.marker}.get(self.strategy, "")


def parse_guard(text: str) -> LoopGuard | None:
    """Read a guard as the command line writes it; "none" for none.

    >>> parse_guard("mend:copies=4").copies
    4

    Raises:
        RunError: an unknown mode or field, or a value that cannot be used.
    """
    name, fields = parse_fields(text, example="mend:copies=3", error=RunError)
    if (name, fields) == ("none", {}):
        return None
    if name not in _MODES:
        raise RunError(f"unknown guard {name!r}{nearest(name, _MODES)} (ban, mend or none)")
    known = [field.name for field in dataclasses.fields(LoopGuard) if field.name != "mode"]
    for key in fields:
        if key not in known:
            raise RunError(f"guard has no field {key!r}{nearest(key, known)} ({', '.join(known)})")
    try:
        return LoopGuard(mode=name, **fields)
    except LongctxError:
        raise
    except (TypeError, ValueError) as error:
        raise RunError(f"guard {text!r} cannot be used ({error}).") from error


class LoopTracker:
    """Runs of one row's tail, for every period at once.

    Args:
        guard: what counts as a loop.
    """

    def __init__(self, guard: LoopGuard) -> None:
        periods = np.arange(1, guard.max_period + 1)
        self._runs = np.zeros(guard.max_period, dtype=np.int64)
        self._enough = np.maximum(guard.copies * periods, guard.min_length) - periods
        # The last tokens, newest first; −1 where there is none. Filled from the back.
        self._room = guard.max_period
        self._recent = np.full(self._room + 4096, -1, dtype=np.int64)
        self._at = len(self._recent) - self._room

    def push(self, token: int) -> None:
        """Add a token to the tail."""
        before = self._recent[self._at : self._at + self._room]
        self._runs = np.where(before == token, self._runs + 1, 0)
        if self._at == 0:
            self._at = len(self._recent) - self._room
            self._recent[self._at :] = before.copy()
        self._at -= 1
        self._recent[self._at] = token

    @property
    def loop(self) -> tuple[int, int] | None:
        """The smallest period that loops now, and the tokens beyond its first copy."""
        found = np.flatnonzero(self._runs >= self._enough)
        return None if not len(found) else (int(found[0]) + 1, int(self._runs[found[0]]))

    @property
    def unsettled(self) -> int:
        """Tokens at the tail that a loop which may be coming would be cut by."""
        return int(self._runs.max())

    def completing(self) -> set[int]:
        """Tokens that would complete a loop."""
        near = np.flatnonzero(self._runs + 1 >= self._enough)
        return {int(self._recent[self._at + period]) for period in near} - {-1}


class BanProcessor(LogitsProcessor):
    """Forbids what would complete a loop of generated tokens.

    Rows that are not those seen before and one token more (beams) are looked through anew.
    """

    def __init__(self, guard: LoopGuard, call: Call) -> None:
        self._guard = guard
        self._call = call
        self._seen: Tensor | None = None
        self._trackers: list[LoopTracker] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits [rows, V] after tokens [rows, S]."""
        if same_start(self._seen, input_ids):
            fresh = [[token] for token in input_ids[:, -1].tolist()]
        else:
            self._trackers = [LoopTracker(self._guard) for _ in input_ids]
            begins = self._call.begin(input_ids)[:, 0].tolist()
            fresh = [row[begin:] for row, begin in zip(input_ids.tolist(), begins, strict=True)]
        self._seen = input_ids
        banned: list[tuple[int, int]] = []
        for row, (tracker, tokens) in enumerate(zip(self._trackers, fresh, strict=True)):
            for token in tokens:
                tracker.push(token)
            banned += [(row, token) for token in tracker.completing()]
        if not banned:
            return scores
        rows, tokens = torch.tensor(banned, device=scores.device).T
        scores = scores.clone()
        scores[rows, tokens] = -torch.inf
        return scores
