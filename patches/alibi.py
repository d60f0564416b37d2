"""ALiBi: attention with linear biases instead of a rotary.

    logit(i, j) − m_h · (i − j),  m_h = 2^(−8h/H) for h = 1 … H, in logits per token

For a number of heads H that is not a power of two, the slopes of the largest power of two P below
H, then every other slope of 2P. The rotary becomes the identity; no weight changes and nothing
depends on the length, so any input may be read.

On a model trained with RoPE this is a different model, which needs training. Use it when you mean
to train with it: what it then reads beyond its training length stays as good as inside it, though
steep heads see only near tokens.

Source: Press, Smith, Lewis 2022, Train Short, Test Long (arXiv:2108.12409), section 3 and its
reference code for the slopes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from longctx.attention.dispatch import LinearBias
from longctx.attention.hook import IdentityRotary
from longctx.attention.layers import AttentionLayer
from longctx.model import put_rotary, rotary_of, text_config
from longctx.patch import Check, Patch
from longctx.rope import Rope

from ._attention import AttentionMethod
from ._scale import check_extent, extended_length

__all__ = ["METHOD", "Alibi", "slopes"]


def slopes(heads: int) -> tuple[float, ...]:
    """The slopes m_h of `heads` heads, in logits (natural log) per token.

    >>> slopes(4)
    (0.25, 0.0625, 0.015625, 0.00390625)
    >>> slopes(6)[4:]
    (0.5, 0.125)
    """
    power = 1 << (heads.bit_length() - 1)
    geometric = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-4 * h / power) for h in range(1, 2 * (heads - power), 2)]
    return tuple(geometric + between)


@dataclass(frozen=True, slots=True)
class Alibi(AttentionMethod):
    """Linear biases on the distance in every full-attention layer."""

    factor: float | None = None
    """How many times longer the declared window becomes; bookkeeping only, ALiBi has no window."""
    target: int | None = None
    """The declared window in tokens; bookkeeping only."""

    name: ClassVar[str] = "alibi"
    slots: ClassVar[tuple[str, ...]] = ("rotary", "attention")
    unbounded: ClassVar[bool] = True
    biases: ClassVar[bool] = True
    changes_far_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_extent(self.name, self.factor, self.target)

    def rule(self, model: PreTrainedModel, layer: AttentionLayer, patch: Patch) -> LinearBias:
        """A slope for each query head."""
        del layer, patch
        return LinearBias(slopes(int(text_config(model).num_attention_heads)))

    def takes(self, layer: AttentionLayer, rope: Rope) -> bool:
        """The layers under the extended rotary: all of them where layer types share one."""
        return rope.layer_type in (None, layer.kind)

    def apply(self, model: PreTrainedModel, patch: Patch) -> None:
        """Put the biases on the layers and the identity in the rotary's place."""
        super(Alibi, self).apply(model, patch)
        rope = patch.rope
        rotary = IdentityRotary(rotary_of(model), rope.layer_type)
        put_rotary(model, rotary, patch.set)
        window = extended_length(self.name, self.factor, self.target, rope.length)
        patch.set(text_config(model), "max_position_embeddings", window)

    def verify(self, model: PreTrainedModel, patch: Patch) -> list[Check]:
        """Look for the rule, and for the identity rotary."""
        return [*super(Alibi, self).verify(model, patch), _rotary_check(model, patch.rope)]


def _rotary_check(model: PreTrainedModel, rope: Rope) -> Check:
    rotary = rotary_of(model)
    x = torch.zeros(1, 1, 1, device=next(model.parameters()).device)
    where = torch.tensor([[rope.length]], device=x.device)
    turned = rotary(x, where, *([] if rope.layer_type is None else [rope.layer_type]))
    cos, sin = (turned.real, turned.imag) if isinstance(turned, torch.Tensor) else turned
    identity = bool((cos == 1).all()) and bool((sin == 0).all())
    return Check("no rotation", identity, f"cos 1 and sin 0 at position {rope.length}")


METHOD = Alibi
