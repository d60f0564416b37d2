"""The loss that keeps a mixture of experts from sending all tokens to a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from longctx.errors import RunError

__all__ = ["LoadBalance", "expert_load"]


@dataclass(frozen=True, slots=True)
class LoadBalance:
    """E · Σ_e f_e P_e, averaged over layers: k where experts share the tokens evenly.

    f_e is the share of tokens whose k chosen experts have e among them, P_e the router's mean
    probability of e. transformers' `load_balancing_loss_func` takes f and P over all layers
    together, in which the collapse of one layer can hide behind that of another; with one layer
    the two are the same.

    Source: Fedus et al. 2021, Switch Transformer (arXiv:2101.03961), equations 4 to 6.
    """

    weight: float = 0.001
    """Factor on it (transformers' `router_aux_loss_coef`)."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise RunError(f"weight={self.weight} (--load-balance): expected a number above 0.")

    def __call__(
        self, router_logits: Sequence[Tensor], active: int, real: Tensor | None = None
    ) -> Tensor:
        """The loss without its weight, a float32 scalar.

        Args:
            router_logits: of each layer, [tokens, experts].
            active: k, experts that a token is sent to.
            real: bool [tokens], False at padding.
        """
        layers: list[Tensor] = []
        for logits in router_logits:
            kept = logits if real is None else logits[real]
            if not len(kept):
                return logits.float()[:0].sum()
            probabilities = kept.float().softmax(-1)
            load = expert_load(kept, active) * active
            layers.append(kept.shape[-1] * (load * probabilities.mean(0)).sum())
        return torch.stack(layers).mean()


def expert_load(logits: Tensor, active: int) -> Tensor:
    """The share of all choices that each expert gets, float32 [experts], from [tokens, experts]."""
    chosen = logits.topk(active, dim=-1).indices
    counts = functional.one_hot(chosen, logits.shape[-1]).sum((0, 1))
    return counts.float() / chosen.numel()
