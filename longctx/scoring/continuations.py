"""Greedy continuations of many prompts, while what the prompts share runs once.

    said = continue_prompts(model, prompts, new_tokens=128, stop={2}, settled=full_score)

Three things make it cheap, and none changes what greedy decoding says. Prompts with a common
beginning share it (`prefix_tree`). What is expected to be said is a draft: one pass over the end of
the prompt and the draft tells how far greedy decoding says just that (Leviathan et al. 2023,
arXiv:2211.17192, at temperature 0), so that a right answer costs no step of decoding. And a
continuation ends as soon as the caller says that what it asks of it is settled.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ..errors import DataError
from ..model import evaluating
from .batching import is_out_of_memory
from .greedy import neutral
from .prefix_tree import CALL, Node, Walk, causal_attention, cost_of, grow, obstacle
from .token_scores import score

__all__ = ["Continuations", "Said", "continue_prompts"]

Said: TypeAlias = Callable[[int, tuple[int, ...] | None, int], None]
"""Told of a prompt by its number: what was said after it, as `Continuations` has it, and the tokens
that were forwarded since it was last told."""


@dataclass(frozen=True, slots=True)
class Continuations:
    """What was said after each prompt."""

    token_ids: tuple[tuple[int, ...] | None, ...]
    """Without the token that ended it; None where the logits held a NaN, and for prompts that were
    passed over."""
    tokens: int
    """Forwarded: of prompts, drafts and what was said."""
    how: str
    """"shared prefixes", or "whole prompts" with the reason."""


def continue_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: Sequence[int],
    stop: Container[int] = (),
    drafts: Sequence[Sequence[int]] | None = None,
    settled: Callable[[int, Sequence[int]], bool] | None = None,
    length_invariant: bool = True,
    known: Iterable[int] = (),
    finished: Said | None = None,
) -> Continuations:
    """Say what greedy decoding says after each prompt, one prompt at a time.

    Args:
        model: a causal language model of transformers, patched or not.
        prompts: token ids, at least one each.
        new_tokens: of each prompt, how many are said at most.
        stop: tokens that end a continuation and are not part of it.
        drafts: what is expected after each prompt; any will do, a wrong one costs its tokens.
        settled: asked for the number of a prompt and what was said so far, after the draft and
            after each token; True ends the continuation there.
        length_invariant: whether a token's logits are the same in a longer input. If not, nothing
            is shared or drafted.
        known: numbers of prompts that an earlier call with the same arguments was `finished` with,
            and that are passed over.
        finished: called as prompts come to their end.

    Raises:
        DataError: an empty prompt, or no tokens to say.
        ModelError: as in `longctx.scoring.token_scores.score`.
    """
    if any(len(prompt) == 0 for prompt in prompts) or any(new < 1 for new in new_tokens):
        raise DataError("expected prompts of at least one token, and one to be said after each.")
    ended = settled or (lambda row, said: False)
    sheet = _Sheet(len(prompts), set(known), finished)
    why = "length-dependent method" if not length_invariant else obstacle(model)
    if why is None and prompts:
        drafts = [[]] * len(prompts) if drafts is None else drafts
        tree, how = grow(prompts, list(map(len, prompts))), "shared prefixes"
        if cost_of(tree, prompts) >= sum(len(prompt) + CALL for prompt in prompts):
            tree, how = Node(0, 0, 0, (), tuple(range(len(prompts)))), "whole prompts (cheaper)"
        walk = _Continuing(model, prompts, drafts, list(new_tokens), stop, ended, sheet)
        try:
            with causal_attention(model), torch.no_grad(), evaluating(model):
                walk.visit(tree)
            return sheet.continuations(how)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        why = "no memory for a cache"
    for row, (prompt, new) in enumerate(zip(prompts, new_tokens, strict=True)):
        if row not in sheet.done:
            said = _generate(model, prompt, new, stop, lambda tokens, row=row: ended(row, tokens))
            sheet.put(row, said, len(prompt) + len(said or ()))
    return sheet.continuations(f"whole prompts ({why})")


class _Sheet:
    """What was said after all prompts, as it comes."""

    def __init__(self, count: int, done: set[int], finished: Said | None) -> None:
        self.done, self._finished = done, finished
        self._said: list[tuple[int, ...] | None] = [None] * count
        self._tokens = 0

    def put(self, row: int, said: tuple[int, ...] | None, tokens: int) -> None:
        self._said[row] = said
        self.done.add(row)
        self._tokens += tokens
        if self._finished is not None:
            self._finished(row, said, tokens)

    def continuations(self, how: str) -> Continuations:
        return Continuations(tuple(self._said), self._tokens, how)


class _Continuing(Walk):
    """A walk that goes on after the prompts."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        drafts: Sequence[Sequence[int]],
        new_tokens: Sequence[int],
        stop: Container[int],
        settled: Callable[[int, Sequence[int]], bool],
        sheet: _Sheet,
    ) -> None:
        super().__init__(model, prompts, sheet.done)
        self._drafts, self._new, self._stop, self._settled = drafts, new_tokens, stop, settled
        self._sheet, self._told = sheet, 0

    def end(self, rows: Sequence[int], done: int) -> None:
        """One prompt after the other: each is said to another end."""
        for row in rows:
            if row in self._sheet.done:
                continue
            said = self._begin(row, done)
            tokens, self._told = self.tokens - self._told, self.tokens
            self._sheet.put(row, None if said is None else tuple(said), tokens)

    def _begin(self, row: int, done: int) -> list[int] | None:
        prompt, cache = self.prompts[row], self.fork()
        # A token of some kind must follow, for the one before it to be scored.
        draft = list(self._drafts[row][: self._new[row]]) or [prompt[-1]]
        ids = torch.tensor([[*prompt[done:], *draft]])
        scores = score(self.model, ids, past_key_values=cache, start=len(prompt) - done)
        self.tokens += ids.numel()
        said: list[int] = []
        for guess, drafted in zip(scores.argmax[0].tolist(), draft, strict=True):
            if guess < 0:
                return None
            if guess in self._stop:
                return said
            said.append(guess)
            if guess != drafted:
                break
        if surplus := len(draft) - len(said) + 1:
            cache.crop(-surplus)  # of the draft, what was not said or is still to be run
        while len(said) < self._new[row] and not self._settled(row, said):
            ids = torch.tensor([said[-1:]], device=self.model.device)
            logits: Tensor = self.model(
                input_ids=ids, past_key_values=cache, use_cache=True
            ).logits[0, -1]
            self.tokens += 1
            if bool(logits.isnan().any()):
                return None
            guess = int(logits.argmax())
            if guess in self._stop:
                break
            said.append(guess)
        return said


class _Settled(StoppingCriteria):
    """Ends `generate` where a token ends the text or the caller has what it wants."""

    def __init__(
        self, first: int, stop: Container[int], settled: Callable[[list[int]], bool]
    ) -> None:
        self._first, self._stop, self._settled = first, stop, settled

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        said: list[int] = input_ids[0, self._first :].tolist()
        ended = said[-1] in self._stop or self._settled(said)
        return torch.tensor([ended], device=input_ids.device)


def _generate(
    model: PreTrainedModel,
    prompt: Sequence[int],
    new_tokens: int,
    stop: Container[int],
    settled: Callable[[list[int]], bool],
) -> tuple[int, ...] | None:
    """By the model's own `generate`, which tells a method how long its request is."""
    ids = torch.tensor([list(prompt)], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad(), neutral(model), evaluating(model):
        out: Any = model.generate(  # pyright: ignore[reportCallIssue]
            ids,  # pyright: ignore[reportArgumentType]
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([_Settled(len(prompt), stop, settled)]),
        )
    if any(bool(logits.isnan().any()) for logits in out.logits):
        return None
    said: list[int] = out.sequences[0, len(prompt) :].tolist()
    return tuple(said[:-1] if said and said[-1] in stop else said)
