"""The loss of a batch: cross-entropy of supervised tokens, and what may be added to it.

    losses = Losses(contrastive=Contrastive(margin=0.5))
    head, linear = head_of(model), projection(model)                      # cross_entropy.py
    hidden = model.base_model(**packed.inputs(batch)).last_hidden_state
    loss = losses(hidden, linear.weight, batch["labels"], bias=linear.bias, head=head,
                  document_ids=batch["document_ids"], count=num_items_in_batch)
    loss.total.backward()

Every part is a sum over supervised tokens divided by one global `count`, so that the parts of a
batch spread over accumulation steps and processes add up to the loss of the whole, and a packed
batch has the loss of the same documents alone. Ignored rows are dropped before anything is
projected; [S, vocab] logits never exist (`cross_entropy.py`, `penalties.py`).

Legend: B batch, S tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from longctx.errors import RunError

from ..data.collate import PADDING
from ..data.tokenize import IGNORED
from .cross_entropy import CHUNK, CrossEntropyKernel, Head, anchor, cross_entropy, prepared
from .distillation import Distillation, Teacher, divergence
from .load_balance import LoadBalance
from .long_ce import LongCE, ShortContext
from .penalties import contrast, token_losses
from .sequence_unlikelihood import SequenceUnlikelihood

__all__ = ["Contrastive", "Loss", "Losses", "Unlikelihood"]


@dataclass(frozen=True, slots=True)
class Unlikelihood:
    """Token-level unlikelihood of what was said before.

    −α Σ_{c ∈ C_t} log(1 − p(c | x_<t)),  C_t = {x_1, …, x_{t−1}} without x_t,

    added to −log p(x_t | x_<t) at each supervised token.

    Source: Welleck et al. 2020 (arXiv:1908.04319), section 5.1.
    """

    alpha: float = 1.0
    """α, its weight."""

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise RunError(
                f"alpha={self.alpha}: expected a weight above 0, or None for no such loss."
            )


@dataclass(frozen=True, slots=True)
class Contrastive:
    """SimCTG: hidden states of different tokens are pushed apart.

    1/(L(L−1)) Σ_i Σ_{j≠i} max(0, ρ − s(h_i, h_i) + s(h_i, h_j))

    over the L tokens of each document, s the cosine similarity; documents are averaged by their
    supervised tokens, as the cross-entropy is.

    Source: Su et al. 2022, A Contrastive Framework for Neural Text Generation (arXiv:2202.06417),
    section 3.1.
    """

    margin: float = 0.5
    """ρ."""

    def __post_init__(self) -> None:
        if not -1 <= self.margin <= 1:
            raise RunError(f"margin={self.margin}: expected ρ between −1 and 1 (0.5 in the paper).")


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a batch and its parts, float32 scalars, each already divided by the count."""

    total: Tensor
    """What is minimised."""
    cross_entropy: Tensor
    """Of the supervised tokens, in nats; without gradient, as the following are."""
    unlikelihood: Tensor | None
    """Without α."""
    contrastive: Tensor | None
    distillation: Tensor | None
    """Without α."""
    long_ce: Tensor | None
    """What stands in the total in place of the cross-entropy."""
    tokens: int
    """Supervised tokens in this batch."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Cross-entropy, and what is added to it."""

    unlikelihood: Unlikelihood | None = None
    """Token-level unlikelihood; None turns it off."""
    contrastive: Contrastive | None = None
    """SimCTG's contrastive loss; None turns it off."""
    sequence: SequenceUnlikelihood | None = None
    """In a share of the updates, in place of all others: unlikelihood of the model's own
    repetitions. The trainer's business (`engine/loss_forward.py`), not that of a call."""
    distillation: Distillation | None = None
    """Learning from a teacher's logits; None turns it off."""
    long_ce: LongCE | None = None
    """Weigh the cross-entropy by what the long context gives to each token; None weighs all
    alike."""
    load_balance: LoadBalance | None = None
    """Even use of a mixture's experts; of the model's forward (`engine/loss_forward.py`), not of a
    call."""
    chunk: int = CHUNK
    """Rows projected at a time."""
    kernel: CrossEntropyKernel = "auto"
    """Liger's kernel on CUDA where it is installed ("auto"), or one of "liger" and "torch"."""

    def __post_init__(self) -> None:
        if self.long_ce is not None and self.unlikelihood is not None:
            raise RunError(
                "long_ce weighs the cross-entropy token by token, and unlikelihood has one of its "
                "own: leave one out (--long-ce, --unlikelihood)."
            )
        if self.long_ce is not None and self.kernel == "liger":
            raise RunError(
                "kernel='liger' has no weights for single tokens: long_ce goes with 'auto'."
            )

    @property
    def whole_document(self) -> tuple[str, ...]:
        """Losses that must see whole documents, for `compatibility.Setup`."""
        names = ("unlikelihood", "contrastive", "sequence", "long_ce")
        return tuple(name for name in names if getattr(self, name) is not None)

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        head: Head | None = None,
        count: float | Tensor | None = None,
        input_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels_aligned: bool = False,
        teacher: tuple[Teacher, Tensor] | None = None,
        short: ShortContext | None = None,
    ) -> Loss:
        """The loss of a batch.

        Args:
            hidden: last hidden states, [B, S, D].
            weight: of the head, [V, D].
            labels: int64 [B, S], −100 at what is not learnt.
            bias: of the head, [V].
            head: what the model does to its logits (`head_of`); None for nothing.
            count: supervised tokens over all processes and accumulation steps of this update
                (transformers' `num_items_in_batch`); None for those of this batch.
            input_ids: [B, S], for unlikelihood.
            document_ids: [B, S], for unlikelihood and the contrastive loss.
            labels_aligned: whether labels stand at the token that predicts them already (context
                parallel's `shift_labels`).
            teacher: for distillation, with its last hidden states [B, S, D'].
            short: for LongCE, from `LongCE.short_context` of this batch.

        Raises:
            RunError: something that a loss needs is missing, or shapes that do not fit.
        """
        head = head or Head()
        self._check(hidden, labels, input_ids, document_ids, labels_aligned)
        if (self.distillation is None) != (teacher is None):
            raise RunError("distillation needs a teacher, and a teacher distillation: pass both.")
        if (self.long_ce is None) != (short is None) or (short is not None and labels_aligned):
            raise RunError(
                "long_ce needs what its short_context(…) gives for unshifted labels, and that "
                "long_ce: pass both."
            )
        if not labels_aligned:
            labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        rows = (labels != IGNORED).flatten().nonzero().flatten()
        tokens = len(rows)
        if count is None:
            count = tokens
        share = 1.0 / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
        states = hidden.flatten(0, 1)
        unlikely: Tensor | None = None
        plain: Tensor | None = None
        if self.long_ce is not None and short is not None:
            kept, targets = states[rows], labels.flatten()[rows]
            nats, plain = self.long_ce.nats(
                *(kept, weight, bias, head, targets), *short.of(rows), chunk=self.chunk
            )
        elif self.unlikelihood is None:
            settings: dict[str, Any] = {"chunk": self.chunk, "kernel": self.kernel}
            kept, targets = states[rows], labels.flatten()[rows]
            nats = cross_entropy(kept, weight, targets, bias=bias, head=head, **settings)
        else:
            assert input_ids is not None
            nats, unlikely = self._token_losses(
                states, weight, bias, head, labels, input_ids, document_ids
            )
            unlikely = unlikely * share
        total = nats = nats * share
        weighted = None if plain is None else nats
        learnt: Tensor | None = None
        if self.distillation is not None and teacher is not None:
            other, theirs = teacher
            alpha, temperature = self.distillation.alpha, self.distillation.temperature
            learnt = share * divergence(
                *(states[rows], weight, bias, head, other, theirs.flatten(0, 1)[rows]),
                temperature=temperature,
            )
            total = (1 - alpha) * nats + alpha * learnt
        if self.unlikelihood is not None and unlikely is not None:
            total = total + self.unlikelihood.alpha * unlikely
        apart: Tensor | None = None
        if self.contrastive is not None:
            apart = self._contrast(hidden, labels, document_ids) * share
            total = total + apart
        nats = nats if plain is None else plain * share
        found = (nats, unlikely, apart, learnt, weighted)
        parts = (None if x is None else x.detach() for x in found)
        return Loss(total, *parts, tokens=tokens)  # pyright: ignore[reportArgumentType]

    def _check(
        self,
        hidden: Tensor,
        labels: Tensor,
        input_ids: Tensor | None,
        document_ids: Tensor | None,
        labels_aligned: bool,
    ) -> None:
        if hidden.ndim != 3 or hidden.shape[:2] != labels.shape:
            raise RunError(
                f"hidden states {[*hidden.shape]} and labels {[*labels.shape]}: expected "
                "[batch, tokens, size] and [batch, tokens]."
            )
        compared = [n for n in self.whole_document if n in ("unlikelihood", "contrastive")]
        if compared and (document_ids is None or labels_aligned):
            raise RunError(
                f"{' and '.join(compared)} needs whole documents: pass "
                "document_ids=batch['document_ids'] and unshifted labels."
            )
        if self.unlikelihood is not None and input_ids is None:
            raise RunError("unlikelihood needs the tokens said before: pass input_ids.")

    def _token_losses(
        self,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        input_ids: Tensor,
        document_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        states, weight, bias = prepared(states, weight, bias)
        nats = unlikely = anchor(states, weight)
        flat, ids = labels.flatten(), input_ids.flatten()
        for span, rows in _documents(labels, document_ids):
            found = token_losses(
                *(states[rows], weight, bias, head, flat[rows]),
                places=rows - span.start + 1,
                document=ids[span],
            )
            nats, unlikely = nats + found[0], unlikely + found[1]
        return nats, unlikely

    def _contrast(self, hidden: Tensor, labels: Tensor, document_ids: Tensor | None) -> Tensor:
        """Σ over documents of the loss times the document's supervised tokens."""
        assert self.contrastive is not None
        states = hidden.flatten(0, 1)
        total = anchor(states, states)
        for span, rows in _documents(labels, document_ids):
            total = total + len(rows) * contrast(states[span], self.contrastive.margin)
        return total


def _documents(labels: Tensor, document_ids: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Span and supervised rows, in the flattened batch, of documents that have any.

    `labels` stand at the token that predicts them, so a document with one has two tokens or more.
    """
    assert document_ids is not None
    start = 0
    for numbers, wanted in zip(document_ids, labels, strict=True):
        values, counts = torch.unique_consecutive(numbers, return_counts=True)
        place = 0
        for value, length in zip(values.tolist(), counts.tolist(), strict=True):
            span = slice(start + place, start + place + length)
            rows = (wanted[place : place + length - 1] != IGNORED).nonzero().flatten() + span.start
            if value != PADDING and len(rows):
                yield span, rows
            place += length
        start += len(numbers)
