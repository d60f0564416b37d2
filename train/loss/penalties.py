"""Losses against degenerate text: unlikelihood and SimCTG's contrast, in chunks.

Everything here is per document and a sum; `objective.py` averages. No [S, V] logits and no [S, S]
similarities exist as a whole.

Legend: L tokens of a document, N rows that predict a supervised token, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .cross_entropy import Head, sum_chunks

__all__ = ["contrast", "repeated", "repetition", "token_losses"]

CHUNK = 256
"""Rows at a time: about six float32 tensors [rows, V] live at once."""
_FLOOR = 1e-5
"""Least 1 − p under the logarithm, as in the authors' code: beyond it there is no gradient."""


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    targets: Tensor,
    places: Tensor,
    document: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and token-level unlikelihood of one document, from the same logits.

    −Σ_t log p(x_t | x_<t)  and  −Σ_t Σ_{c ∈ C_t} log(1 − p(c | x_<t)),
    C_t = {x_1, …, x_{t−1}} without x_t, where t runs over the supervised tokens.

    Source: Welleck et al. 2020, Neural Text Generation with Unlikelihood Training
    (arXiv:1908.04319), section 5.1: the token-level objective without its α.

    Args:
        hidden: states that predict the targets, [N, D].
        weight: [V, D].
        bias: [V].
        head: scale and soft cap.
        targets: x_t, int64 [N].
        places: t, from 0, int64 [N].
        document: all tokens of the document, int64 [L].
        chunk: rows at a time.
    """
    # Candidates of a row are the tokens whose first place lies before it: one [V] table is enough.
    size = len(document)
    first = torch.full((len(weight),), size, device=document.device)
    first.scatter_reduce_(0, document, torch.arange(size, device=document.device), "amin")

    def both(hidden: Tensor, targets: Tensor, places: Tensor) -> Tensor:
        log_p = head.logits(hidden, weight, bias).log_softmax(-1)
        candidates = (first < places[:, None]).scatter(1, targets[:, None], False)
        nats = -log_p.gather(1, targets[:, None]).sum()
        unlikely = (-torch.expm1(log_p)).clamp(min=_FLOOR).log()
        return torch.stack([nats, -unlikely.masked_fill(~candidates, 0.0).sum()])

    cross_entropy, unlikelihood = sum_chunks(both, chunk, hidden, targets, places)
    return cross_entropy, unlikelihood


def repeated(tokens: Tensor, n: int) -> Tensor:
    """Which tokens lie in an n-gram that occurred before, bool [L].

    x_t is marked if some n-gram (x_s, …, x_{s+n−1}) with s ≤ t < s + n is found within
    x_1 … x_{s−1}, that is, wholly before it.

    >>> repeated(torch.tensor([1, 2, 3, 1, 2]), 2).tolist()
    [False, False, False, True, True]

    Source: Welleck et al. 2020 (arXiv:1908.04319), section 5.2, the repeating n-gram candidates.
    """
    ids: list[int] = tokens.tolist()
    first: dict[tuple[int, ...], int] = {}
    marked = torch.zeros(len(ids), dtype=torch.bool)
    for start in range(len(ids) - n + 1):
        gram = tuple(ids[start : start + n])
        if first.setdefault(gram, start) + n <= start:
            marked[start : start + n] = True
    return marked.to(tokens.device)


def repetition(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    targets: Tensor,
    chunk: int = CHUNK,
) -> Tensor:
    """−Σ_t log(1 − p(x_t | x_<t)) over the repeated tokens of a continuation.

    Source: Welleck et al. 2020 (arXiv:1908.04319), section 5.2, with C^t = {x_t}.

    Args:
        hidden: states that predict them, [N, D].
        weight: [V, D].
        bias: [V].
        head: scale and soft cap.
        targets: the repeated tokens, int64 [N].
        chunk: rows at a time.
    """

    def rows(hidden: Tensor, targets: Tensor) -> Tensor:
        nats = functional.cross_entropy(
            head.logits(hidden, weight, bias), targets, reduction="none"
        )
        return -(-torch.expm1(-nats)).clamp(min=_FLOOR).log().sum()

    return sum_chunks(rows, chunk, hidden, targets)


def contrast(hidden: Tensor, margin: float, chunk: int = 1024) -> Tensor:
    """SimCTG's contrastive loss of one document, a scalar.

    1/(L(L−1)) Σ_i Σ_{j≠i} max(0, ρ − s(h_i, h_i) + s(h_i, h_j)),  s the cosine similarity.

    Source: Su et al. 2022, A Contrastive Framework for Neural Text Generation (arXiv:2202.06417),
    section 3.1 (L_CL).

    Args:
        hidden: last hidden states of all tokens of the document, [L, D], L ≥ 2.
        margin: ρ, between −1 and 1.
        chunk: rows of the similarity matrix at a time.
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    unit = functional.normalize(hidden.to(precise), dim=-1)
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _Hinge.apply(unit, margin, chunk)  # pyright: ignore[reportAssignmentType]
    return total / (len(hidden) * (len(hidden) - 1))


class _Hinge(torch.autograd.Function):
    """Σ_i Σ_{j≠i} max(0, ρ − 1 + u_i·u_j) of unit vectors [L, D].

    Its gradient at u_i is 2 Σ_j u_j over the pairs inside the margin, so it is made along with the
    value from the same similarities.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor, margin: float, chunk: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = unit.new_zeros(())
        gradient = torch.empty_like(unit) if ctx.needs_input_grad[0] else None
        for first in range(0, len(unit), chunk):
            part = unit[first : first + chunk]
            excess = part @ unit.mT + (margin - 1.0)
            rows = torch.arange(len(part), device=unit.device)
            excess[rows, first + rows] = 0.0
            excess.clamp_(min=0.0)
            total += excess.sum()
            if gradient is not None:
                torch.mm(excess.sign_(), unit, out=gradient[first : first + chunk])
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(2.0))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None
