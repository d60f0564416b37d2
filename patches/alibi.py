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
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from longctx.attention.dispatch import LinearBias
from longctx.attention.hook import ATTRIBUTE, NAME, IdentityRotary, register
from longctx.errors import ModelError
from longctx.model import attention_modules, decoder_of, rotary_of, text_config
from longctx.patch import Check, Method, Patch
from longctx.rope import Rope

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
class Alibi:
    """Linear biases on the distance in every full-attention layer."""

    factor: float | None = None
    """How many times longer the declared window becomes; bookkeeping only, ALiBi has no window."""
    target: int | None = None
    """The declared window in tokens; bookkeeping only."""

    name: ClassVar[str] = "alibi"
    slots: ClassVar[tuple[str, ...]] = ("rotary", "attention")

    def __post_init__(self) -> None:
        check_extent(self.name, self.factor, self.target)

    @property
    def length_invariant(self) -> bool:
        """True: the bias depends on the distance alone."""
        return True

    def native_rope(self, rope: Rope) -> dict[str, Any] | None:
        """None: plain transformers cannot say it."""
        return None

    def neutral(self, rope: Rope) -> Method | None:
        """None: it replaces the rotary whatever its settings."""
        return None

    def apply(self, model: PreTrainedModel, patch: Patch) -> None:
        """Put the identity in the rotary's place and the bias on the full-attention layers.

        Raises:
            ModelError: attention that cannot be reached, or soft-capped.
        """
        config = text_config(model)
        if getattr(config, "attn_logit_softcapping", None) is not None:
            raise ModelError(
                f"model type {config.model_type!r} caps its attention logits softly, which alibi's "
                "attention does not compute; methods that change frequencies work (yarn, ntk, …)."
            )
        bias = LinearBias(slopes(int(config.num_attention_heads)))
        for module in _full_layers(model, patch.rope.layer_type):
            patch.set(module, ATTRIBUTE, bias)
        native = rotary_of(model)
        rotary = IdentityRotary(native, patch.rope.dim, patch.rope.layer_type)
        patch.set(decoder_of(model), "rotary_emb", rotary)
        register()
        patch.set(config, "_attn_implementation_internal", NAME)
        window = extended_length(self.factor, self.target, patch.rope)
        patch.set(config, "max_position_embeddings", window)

    def verify(self, model: PreTrainedModel, patch: Patch) -> list[Check]:
        """Look for the bias in every layer, the identity rotary and the attention in use."""
        config = text_config(model)
        layers = _full_layers(model, patch.rope.layer_type)
        wanted = slopes(int(config.num_attention_heads))
        biases = [getattr(module, ATTRIBUTE, None) for module in layers]
        used = getattr(config, "_attn_implementation", None)
        there = sum(isinstance(b, LinearBias) and b.slopes == wanted for b in biases)
        return [
            Check(
                "linear bias",
                there == len(layers) > 0,
                f"{there} of {len(layers)} full-attention layers, "
                f"{len(wanted)} slopes {max(wanted):.4g} … {min(wanted):.4g}",
            ),
            Check("attention in use", used == NAME, f"attn_implementation is {used!r}"),
            _rotary_check(model, patch.rope),
        ]


def _full_layers(model: PreTrainedModel, layer_type: str | None) -> list[torch.nn.Module]:
    """Attention modules under the extended rotary: all of them where layer types share one."""
    return [
        module
        for _, module, kind in attention_modules(model)
        if layer_type is None or kind == layer_type
    ]


def _rotary_check(model: PreTrainedModel, rope: Rope) -> Check:
    rotary = rotary_of(model)
    x = torch.zeros(1, 1, 1, device=next(model.parameters()).device)
    where = torch.tensor([[rope.length]], device=x.device)
    cos, sin = rotary(x, where, *([] if rope.layer_type is None else [rope.layer_type]))
    identity = bool((cos == 1).all()) and bool((sin == 0).all())
    return Check("no rotation", identity, f"cos 1 and sin 0 at position {rope.length}")


METHOD = Alibi
