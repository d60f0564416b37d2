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
        total = hidden.new_zeros((), dtype=precise)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        inputs = (hidden, weight, bias)
        grads = [
            torch.zeros_like(x, dtype=x.dtype if x is hidden else precise)
            if x is not None and needed
            else None
            for x, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        ]
        grad_hidden, grad_weight, grad_bias = grads
        for first in range(0, len(hidden), chunk):
            rows = slice(first, first + chunk)
            logits = functional.linear(hidden[rows], weight, bias).to(precise)
            goals = targets[rows, None]
            norms = logits.logsumexp(1, keepdim=True)
            total += (norms - logits.gather(1, goals)).sum()
            if all(grad is None for grad in grads):
                continue
            # p − 1 at the target: the gradient of the logits, in their place.
            slopes = logits.sub_(norms).exp_()
            slopes.scatter_add_(1, goals, slopes.new_full((1, 1), -1.0).expand(len(goals), 1))
            short = slopes.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = short @ weight
            if grad_weight is not None and weight.dtype == precise:
                grad_weight.addmm_(short.T, hidden[rows])
            elif grad_weight is not None:  # a chunk's product is rounded, the sum over chunks not
                grad_weight += short.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += slopes.sum(0)
        ctx.grads = grads
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled = [
            None if made is None else made.mul_(grad.to(made.dtype)).to(dtype)
            for made, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        del ctx.grads
        return (*scaled, None, None)
