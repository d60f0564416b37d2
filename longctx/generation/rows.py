"""A prompt's continuation as it grows: tokens, what the guard did, what the stream has got."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from .detokenize import TextStream
from .loop_guard import LoopGuard, LoopTracker
from .result import GenerationEvent

__all__ = ["Row", "Watch"]

_DOUBLINGS = 20  # far more tokens than any row has


@dataclass(slots=True)
class Row:
    """The state of one prompt."""

    index: int
    """Among the prompts of the call."""
    prompt: tuple[int, ...]
    limit: int
    """New tokens at most."""
    ends: Collection[int]
    """Tokens that end it."""
    guard: LoopGuard | None
    """One that mends, or None."""
    seed: int
    generator: torch.Generator = field(init=False)
    tokens: list[int] = field(default_factory=list[int])
    finish: Literal["eos", "length", "loop"] | None = None
    events: list[GenerationEvent] = field(default_factory=list[GenerationEvent])
    stream: TextStream | None = None
    warmer: float = 0.0
    """What its temperature is above the decoding's."""
    looped: bool = False
    """Whether a loop stands at its tail, for `mend`."""
    _tracker: LoopTracker | None = None
    _tries: int = 0
    _place: int = 0  # generated tokens where the tries began
    _places: int = 0  # where it looped, the latest included
    _warm_until: int = 0  # generated tokens

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        if self.guard is not None:
            self._tracker = LoopTracker(self.guard)

    @property
    def at_rest(self) -> bool:
        """Whether tokens that come now are not its own."""
        return self.looped or self.finish is not None

    def accept(self, token: int) -> bool:
        """Take the next token; whether the row wants no more now."""
        if self.at_rest:
            return True
        if token in self.ends:
            self.finish = "eos"
        else:
            self._push(token)
            if self._tracker is not None and self._tracker.loop is not None:
                self.looped = True
            elif len(self.tokens) >= self.limit:
                self.finish = "length"
            self._cool()
        self._show()
        return self.at_rest

    def mend(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Cut the loop at the tail to one copy, and try again or give up."""
        guard, tracker = self.guard, self._tracker
        assert guard is not None
        assert tracker is not None
        assert tracker.loop is not None
        period, beyond = tracker.loop
        onset = len(self.tokens) - beyond - period
        self._event("loop", f"{period} tokens repeat from token {onset} on: cut by {beyond}")
        kept, self.tokens = self.tokens[: len(self.tokens) - beyond], []
        self._tracker = LoopTracker(guard)
        for token in kept:
            self._push(token)
        self.looped = False
        if len(kept) >= self._place + guard.recover_after or not self._tries:
            self._tries, self._place = 0, len(kept)
            self._places += 1
        self._tries += 1
        if self._tries > guard.retries:
            self._event("gave up", f"{guard.retries} tries from token {self._place} on all looped")
            self.finish = "loop"
            self._show()
            return
        self.warmer = guard.temperature * (1 + self._tries) / 2
        # A loop that comes again under the first settings shows that they were too early.
        self._warm_until = len(kept) + guard.recover_after * 2 ** min(self._places - 1, _DOUBLINGS)
        what = f"try {self._tries}, temperature {self.warmer:g} higher"
        if guard.inserted:
            ids: Any = tokenizer.encode(guard.inserted, add_special_tokens=False)
            for token in ids[: self.limit - len(self.tokens)]:
                self._push(token)
            what += f", after {guard.inserted!r}"
        self._event("retry", what)
        if len(self.tokens) >= self.limit:
            self.finish = "length"
        self._show()

    def take(self, tokens: Sequence[int]) -> None:
        """Take a whole continuation."""
        for token in tokens:
            if self.accept(token):
                break

    def _push(self, token: int) -> None:
        self.tokens.append(token)
        if self._tracker is not None:
            self._tracker.push(token)

    def _cool(self) -> None:
        if self.warmer and len(self.tokens) >= self._warm_until:
            self._event("recovered", "the first settings again")
            self.warmer = 0.0

    def _event(self, kind: Literal["loop", "retry", "recovered", "gave up"], detail: str) -> None:
        self.events.append(GenerationEvent(self.index, len(self.tokens), kind, detail))

    def _show(self) -> None:
        if self.stream is None:
            return
        unsettled = 0 if self._tracker is None or self.finish else self._tracker.unsettled
        settled = self.tokens[: max(0, len(self.tokens) - unsettled)]
        self.stream.show(settled, last=self.finish is not None)


class Watch(StoppingCriteria):
    """Hands each new token to its row, at every step, and says which rows are done."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether each row is done, bool [B], after tokens [B, S]."""
        tokens = input_ids[:, -1].tolist()
        done = [row.accept(token) for row, token in zip(self._rows, tokens, strict=True)]
        return torch.tensor(done, device=input_ids.device)
