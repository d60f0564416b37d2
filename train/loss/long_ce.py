"""LongCE: cross-entropy in which a token counts by what the long context gives to it.

    settings = LongCE(short=4096)
    short = settings.short_context(model, head, ids, positions, labels, document_ids)
    weighted, plain = settings.nats(states, weight, bias, head, targets, *short.of(rows))

Legend: B batch, S tokens, N rows that predict a supervised token, D hidden size, V vocabulary,
K tokens of the short context, d tokens whose short contexts begin at one place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from longctx.errors import RunError

from ..data.collate import PADDING
from ..data.tokenize import IGNORED
from .cross_entropy import CHUNK, Head, prepared, projection, sum_chunks

__all__ = ["LongCE", "ShortContext"]


@dataclass(frozen=True, slots=True)
class ShortContext:
    """How likely tokens are with what stands shortly before them; rows of the flattened batch."""

    nats: Tensor
    """[B·S]: −log p of the token after, 0 where that is not known; float32, or float64 with the
    model."""
    known: Tensor
    """bool [B·S]: whether the token after is learnt and has K tokens or more before it."""

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Both at these rows, [N]."""
        return self.nats[rows], self.known[rows]


@dataclass(frozen=True, slots=True)
class LongCE:
    """Long-context cross-entropy: tokens weigh by the likelihood ratio of long and short context.

    −1/n Σᵢ w(xᵢ) log p(xᵢ | lᵢ),   w(xᵢ) = min(p(xᵢ | lᵢ) / p(xᵢ | sᵢ), γ),
    lᵢ = (x₁, …, xᵢ₋₁),   sᵢ = (xᵢ₋ₖ, …, xᵢ₋₁)

    in place of the cross-entropy, over the n supervised tokens; the weights carry no gradient. The
    model itself gives both likelihoods, as it is in that update. The short contexts of d tokens in
    a row begin at one place, so that sᵢ has K to K + d − 1 tokens. Tokens with fewer than K before
    them in their document weigh 1. As in the paper, the weights do not sum to n.

    Windows of K + d tokens are read without gradient beside each document, where it is longer than
    K: about (K + d) / d forward passes over what lies beyond K tokens, each shorter than the whole.

    Source: Fang et al. 2024, "What is Wrong with Perplexity for Long-context Language Modeling?"
    (arXiv:2410.23771), section 3.2 with γ = 5, K = 4,096 and d = 1,024 (rows of 32k tokens, which
    took about 80% longer than plain cross-entropy there). As in its code, short contexts have no
    BOS but at the beginning of the document. Here documents of a row are kept apart, and positions
    that skip (PoSE) skip in the short context too.
    """

    short: int = 4096
    """K."""
    step: int | None = None
    """d; None takes a quarter of K. Larger ones cost less and are less exact."""
    gamma: float = 5.0
    """γ, the largest weight, 1 or more."""

    def __post_init__(self) -> None:
        for name, value in (("short", self.short), ("step", self.step)):
            if (type(value) is not int or value < 1) and (name, value) != ("step", None):
                raise RunError(f"{name}={value!r} (--long-ce): expected 1 token or more.")
        if not 1 <= self.gamma < math.inf:
            raise RunError(
                f"gamma={self.gamma} (--long-ce-gamma): expected a largest weight of 1 or more (5 "
                "in the paper)."
            )

    @property
    def stride(self) -> int:
        """d, in tokens."""
        return self.step or max(1, self.short // 4)

    @torch.no_grad()
    def short_context(
        self,
        model: PreTrainedModel,
        head: Head,
        input_ids: Tensor,
        position_ids: Tensor | None,
        labels: Tensor,
        document_ids: Tensor,
    ) -> ShortContext:
        """Read the short windows of a batch, at most as many tokens at a time as the batch has.

        Args:
            model: called without packing: each window is a text of its own.
            head: what it does to its logits.
            input_ids: [B, S].
            position_ids: [B, S]; None for 0 to S − 1.
            labels: unshifted, −100 at what is not learnt, [B, S].
            document_ids: −1 at padding, [B, S].
        """
        precise = torch.promote_types(projection(model).weight.dtype, torch.float32)
        nats = torch.zeros(labels.numel(), dtype=precise, device=labels.device)
        known = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
        if position_ids is None:
            position_ids = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        size, body = self.short + self.stride, model.base_model
        found = list(self._windows(labels, document_ids))
        at_once = max(1, labels.numel() // size)
        for first in range(0, len(found), at_once):
            part = found[first : first + at_once]
            # Whatever stands after a window is seen by nothing that is scored.
            ids = torch.stack(
                [_padded(input_ids[row, start:stop], size) for row, start, stop in part]
            )
            positions = torch.stack(
                [_continued(position_ids[row, start:stop], size) for row, start, stop in part]
            )
            output: Any = body(
                input_ids=ids,
                position_ids=positions - positions[:, :1],
                attention_mask=torch.ones_like(ids),
                use_cache=False,
            )
            states: list[Tensor] = []
            rows: list[Tensor] = []
            for hidden, (row, start, stop) in zip(output.last_hidden_state, part, strict=True):
                learnt = (labels[row, start + self.short : stop] != IGNORED).nonzero().flatten()
                states.append(hidden[learnt + self.short - 1])
                rows.append(learnt + row * labels.shape[1] + start + self.short - 1)
            where = torch.cat(rows)
            short = _nats(model, head, torch.cat(states), labels.flatten()[where + 1])
            nats[where] = short.to(precise)
            known[where] = True
        return ShortContext(nats, known)

    def _windows(self, labels: Tensor, document_ids: Tensor) -> Iterator[tuple[int, int, int]]:
        """Row, first token and token after the last, of windows that score something."""
        for row, numbers in enumerate(document_ids):
            values, counts = torch.unique_consecutive(numbers, return_counts=True)
            begin = 0
            for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                end = begin + count
                for first in range(begin + self.short, end, self.stride):
                    stop = min(first + self.stride, end)
                    if value != PADDING and bool((labels[row, first:stop] != IGNORED).any()):
                        yield row, first - self.short, stop
                begin = end

    def nats(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        targets: Tensor,
        short: Tensor,
        known: Tensor,
        chunk: int = CHUNK,
    ) -> tuple[Tensor, Tensor]:
        """Σ w(x) (−log p(x)) and Σ −log p(x), the latter without gradient; float32 scalars.

        Args:
            hidden: states that predict the targets, [N, D].
            weight: of the head, [V, D].
            bias: of the head, [V].
            head: what the model does to its logits.
            targets: int64 [N].
            short: −log p with the short context, [N].
            known: whether that is known, else the weight is 1, bool [N].
            chunk: rows projected at a time.
        """
        hidden, weight, bias = prepared(hidden, weight, bias)
        most = math.log(self.gamma)

        def both(rows: Tensor, goals: Tensor, short: Tensor, known: Tensor) -> Tensor:
            logits = head.logits(rows, weight, bias)
            nats = functional.cross_entropy(logits, goals, reduction="none")
            ratio = (short - nats.detach()).clamp(max=most).exp()
            return torch.stack([
                (torch.where(known, ratio, 1.0) * nats).sum(),
                nats.detach().sum(),
            ])  # fmt: skip

        weighted, plain = sum_chunks(both, chunk, hidden, targets, short, known)
        return weighted, plain


def _padded(part: Tensor, size: int) -> Tensor:
    return functional.pad(part, (0, size - len(part)))


def _continued(positions: Tensor, size: int) -> Tensor:
    """Positions that go on one by one: some methods take no others, not even of padding."""
    steps = torch.arange(1, size - len(positions) + 1, device=positions.device)
    return torch.cat([positions, positions[-1] + steps])


def _nats(model: PreTrainedModel, head: Head, states: Tensor, targets: Tensor) -> Tensor:
    """−log p of each target, [N]."""
    linear = projection(model)
    states, weight, bias = prepared(states, linear.weight, linear.bias)
    return torch.cat(
        [
            functional.cross_entropy(head.logits(rows, weight, bias), goals, reduction="none")
            for rows, goals in zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
        ]
    )
