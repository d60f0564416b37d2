"""A loss on what the model itself says: it continues a prefix, and unlearns its repetitions.

settings = SequenceUnlikelihood()
if settings.has_turn(step):
    loss = settings(model, settings.prefixes(batch, step))
    loss.backward()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel

from longctx.errors import RunError
from longctx.model import unwrapped

from ..data.tokenize import IGNORED
from .cross_entropy import Head, anchor, head_of, prepared, projection
from .penalties import repeated, repetition

__all__ = ["SequenceUnlikelihood"]


@dataclass(frozen=True, slots=True)
class SequenceUnlikelihood:
    """Sequence-level unlikelihood of what the model itself repeats.

    The model continues a prefix greedily; then, in one teacher-forced pass over its own words,

    −α/N Σ_t log(1 − p(x_t | x_<t)) over those x_t of the N continued tokens that lie in an n-gram
    found wholly before it **in the continuation**. Quoting the prefix is not punished: it is what
    retrieval does.

    Source: Welleck et al. 2020 (arXiv:1908.04319), section 5.2; there it takes the place of the
    other losses in half of the updates, with prefixes of 50 tokens.
    """

    alpha: float = 1.0
    """α, its weight."""
    ngram: int = 4
    """n."""
    tokens: int = 100
    """N, how far a prefix is continued; an end token stops it before."""
    prefix: int = 50
    """Tokens that are continued."""
    share: float = 0.5
    """Of the updates that have this loss, and no other."""

    def __post_init__(self) -> None:
        if not self.alpha > 0 or self.ngram < 1 or self.tokens < 2 * self.ngram:
            raise RunError(f"{self}: expected α > 0, n ≥ 1 and at least 2n tokens to continue.")
        if self.prefix < 1 or not 0 < self.share <= 1:
            raise RunError(f"{self}: expected a prefix of 1 or more and a share above 0, up to 1.")

    def has_turn(self, step: int) -> bool:
        """Whether an update has this loss; by chance, and the same in every process and run."""
        return Random(f"sequence/{step}").random() < self.share

    def prefixes(self, batch: Mapping[str, Tensor], step: int) -> Tensor:
        """Take from each document the tokens before a random one that is learnt: int64 [N, P].

        P is `self.prefix`, or less where no document has so many tokens before what is learnt;
        documents that have fewer are left out. N is 0 where nothing is learnt.

        Args:
            batch: input_ids, labels and document_ids, [B, S].
            step: chooses the places.
        """
        rng = Random(f"prefix/{step}")
        found: list[tuple[Tensor, list[int]]] = []  # a document, and how much precedes its targets
        for ids, labels, numbers in zip(
            *(batch[name] for name in ("input_ids", "labels", "document_ids")), strict=True
        ):
            for number in numbers.unique().tolist():
                own = numbers == number
                places = (labels[own][1:] != IGNORED).nonzero().flatten() + 1
                if len(places):
                    found.append((ids[own], places.tolist()))
        size = min(self.prefix, max((places[-1] for _, places in found), default=0))
        kept = [
            document[place - size : place]
            for document, places in found
            if (fitting := [place for place in places if place >= size])
            for place in (rng.choice(fitting),)
        ]
        return torch.stack(kept) if kept else batch["input_ids"][:0, :0]

    def __call__(
        self, model: PreTrainedModel, prefix: Tensor, *, head: Head | None = None
    ) -> Tensor:
        """Continue and score, a float32 scalar.

        Args:
            model: without packed documents; dropout is off while it continues.
            prefix: int64 [B, P], without padding.
            head: `head_of(model)`, where it is known already.
        """
        head = head or head_of(model)
        ids, real = self.continued(model, prefix)
        body = unwrapped(model)
        mask = torch.ones_like(ids)
        hidden = body.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        linear = projection(model)
        start = prefix.shape[1]
        marked = torch.stack(
            [
                functional.pad(repeated(row[start:][seen], self.ngram), (0, int((~seen).sum())))
                for row, seen in zip(ids, real, strict=True)
            ]
        )
        states, weight, bias = prepared(
            hidden[:, start - 1 : -1][marked], linear.weight, linear.bias
        )
        if not len(states):
            return anchor(hidden, weight)
        found = repetition(states, weight, bias, head, ids[:, start:][marked])
        return self.alpha / int(real.sum()) * found

    def continued(self, model: PreTrainedModel, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """Greedy continuations [B, P + N], and which of the N are there, bool [B, N].

        Padding follows an end token.
        """
        own: Any = model.generation_config
        ends = own.eos_token_id if own is not None else None
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            use_cache=True,
        )
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                generate: Any = model.generate  # a mixin that stubs lose track of
                ids: Any = generate(
                    prefix, attention_mask=torch.ones_like(prefix), generation_config=settings
                )
        finally:
            model.train(training)
        words = ids[:, prefix.shape[1] :]
        ended = torch.isin(words, torch.tensor(ends, dtype=words.dtype, device=words.device))
        return ids, ended.cumsum(1) - ended.int() == 0
