"""The chunked cross-entropy that torch has from 2.13 on, for older ones: delete it with them.

Legend: N rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, chunk: int
) -> Tensor:
    """Sum of −log p(target) over rows, whose logits exist for `chunk` rows at a time.

    The gradients are made in the same pass, since the loss is a sum: three matrix products for
    each chunk, as with whole logits.

    Args:
        hidden: [N, D].
        weight: [V, D].
        targets: int64 [N], none of them ignored.
        bias: [V].
        chunk: rows at a time.

    Returns:
        A scalar in nats, float32 (float64 where the weight is).
    """
    loss: Any = _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
    ) -> Tensor:
        precise = torch.promote_types(weight.dtype, torch.float32)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if for_hidden else None
        # Sums over chunks are kept in float32 where the gradients are shorter.
        grad_weight = torch.zeros_like(weight, dtype=precise) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=precise) if for_bias and bias is not None else None

        def add(rows: slice) -> Tensor:
            """Loss of a chunk; probabilities and gradients take the place of its logits."""
            logits = functional.linear(hidden[rows], weight, bias).to(precise)
            goals = targets[rows, None]
            largest = logits.amax(1, keepdim=True)
            reached = logits.gather(1, goals) - largest
            norm = logits.sub_(largest).exp_().sum(1, keepdim=True)
            if grad_hidden is not None or grad_weight is not None or grad_bias is not None:
                slopes = logits.div_(norm)  # p, and p − 1 at the target
                slopes.scatter_add_(1, goals, slopes.new_full((1, 1), -1.0).expand_as(goals))
                if grad_bias is not None:
                    grad_bias.add_(slopes.sum(0))
                slopes = slopes.to(weight.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = slopes @ weight
                if grad_weight is not None and weight.dtype == precise:
                    grad_weight.addmm_(slopes.T, hidden[rows])
                elif grad_weight is not None:
                    grad_weight.add_(slopes.T @ hidden[rows])
            return (norm.log() - reached).sum()

        total = hidden.new_zeros((), dtype=precise)
        for first in range(0, len(hidden), chunk):
            total += add(slice(first, first + chunk))
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = [x if x is None else x.mul_(grad).to(ctx.dtype) for x in ctx.grads]
        del ctx.grads
        return (*grads, None, None)
