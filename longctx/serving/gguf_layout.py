"""How llama.cpp lays out a model: its architecture, and the names and order of weights.

LLaMA-like models are written as `llama`, which turns neighbouring channels (2i, 2i + 1) where
transformers turns i and i + d/2: rows of the query and key projections are put in that order. Their
frequencies are free, since `llama` reads a divisor for each plane (`rope_freqs.weight`):

    angle of plane i at position p = p · freq_base^(−2i/d) / rope_freqs[i]
    cos and sin × attn_factor

Models with linear biases and no rotary are written as `refact`, whose slopes are those of ALiBi.
Qwen3 has norms on queries and keys, which `llama` has not; `qwen3` reads no divisors, so that it
takes only what llama.cpp computes itself (a base, linear, YaRN).

Source: llama.cpp's src/models/{llama,refact,qwen3}.cpp, src/llama-context.cpp and ggml's rope.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.dispatch import LinearBias
from ..attention.hook import ATTRIBUTE, SCALE, IdentityRotary
from ..attention.layers import attention_layers
from ..errors import ModelError
from ..model import rope_entry, rope_of, rotary_of, text_config
from ..patch import methods_of
from ..rope import STANDSTILL, Frequencies, Rope, frequencies_of

__all__ = ["Layout", "layout_of", "tensors_of"]

_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of transformers whose forward is that of the architectures above."""
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PLACE = re.compile(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)")
_CLOSE = 1e-5
"""Largest relative difference of a frequency that llama.cpp computes itself from the model's."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What llama.cpp is told of a model beside its weights and its tokenizer."""

    architecture: str
    """`general.architecture`."""
    permuted: bool
    """Whether rows of queries and keys are put in the order of neighbouring channels."""
    rope: Mapping[str, float | int | str] = field(default_factory=dict)
    """Keys below `<architecture>.rope.`."""
    divisors: Tensor | None = None
    """`rope_freqs.weight`, float32 [d/2]; None where no plane is changed."""


def layout_of(model: PreTrainedModel) -> Layout:
    """Choose how llama.cpp computes a model, from what stands in it.

    Args:
        model: as `longctx.load` gives it, with its patches in place.

    Raises:
        ModelError: llama.cpp has no way to compute it; the message names what stands in the way
            and what to do instead.
    """
    config = text_config(model)
    kind = str(config.model_type)
    if kind not in _TYPES:
        raise ModelError(
            f"model type {kind!r}: longctx writes {', '.join(_TYPES)} as GGUF. llama.cpp's own "
            "converter takes more types, and drops most changes of frequencies without a word: "
            "hold its server against the checkpoint (longctx serve-check)."
        )
    _refuse_beyond(model)
    if config.hidden_act != "silu":
        raise ModelError(
            f"hidden_act {config.hidden_act!r}: llama.cpp computes 'silu' for model type {kind!r}."
        )
    normed = any(".q_norm." in name for name, _ in model.named_parameters())
    if isinstance(rotary_of(model), IdentityRotary):
        if normed:
            raise ModelError(
                f"model type {kind!r} has norms on its queries and keys, which llama.cpp's only "
                "architecture with linear biases (refact) has not: serve it by transformers, with "
                "longctx.load."
            )
        return Layout("refact", permuted=False)
    rope = rope_of(model)
    head = int(attention_layers(model)[0].module.head_dim)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if rope.dim != head:
        raise ModelError(
            f"{rope.dim} of a head's {head} channels are turned: llama.cpp turns all of them for "
            f"model type {kind!r}."
        )
    installed, scaling = frequencies_of(rotary_of(model), rope.layer_type)
    frequencies = Frequencies(installed.double().cpu().clamp(min=STANDSTILL), float(scaling))
    if normed:
        return Layout("qwen3", permuted=False, rope=_computed(model, rope, frequencies))
    return _divided(rope, frequencies)


def _refuse_beyond(model: PreTrainedModel) -> None:
    """Refuse what is done to attention, and frequencies that depend on the length."""
    methods, bias = methods_of(model), isinstance(rotary_of(model), IdentityRotary)
    for method in methods:
        if not method.length_invariant:
            raise ModelError(
                f"{method.name} turns the same token otherwise in a longer input, and a GGUF "
                "file has one frequency for each plane: extend the original by ntk for the length "
                "that you serve, or serve it by transformers (longctx.load)."
            )
    for layer in attention_layers(model):
        rule: Any = getattr(layer.module, ATTRIBUTE, None)
        acts = rule is not None and not all(method.trains_only for method in methods)
        if getattr(layer.module, SCALE, None) is not None or (acts and not _is_bias(rule, bias)):
            beyond = [method.name for method in methods if not method.plain_loadable]
            names = " and ".join(beyond) or "a rule of attention"
            raise ModelError(
                f"{names}: llama.cpp has no way to compute it, and the file would hold the model "
                "without it. Serve it by transformers (longctx.load), or extend the original by a "
                "method that changes frequencies (yarn, linear, ntk, …)."
            )
        if layer.window is not None:
            raise ModelError(
                f"layer {layer.index} sees {layer.window} tokens back (sliding_window): llama.cpp "
                "lets all layers of this architecture see everything. Serve it by transformers."
            )
        usual = float(layer.module.head_dim) ** -0.5  # pyright: ignore[reportArgumentType]
        if abs(float(layer.module.scaling) - usual) > 1e-6 * usual:  # pyright: ignore[reportArgumentType]
            raise ModelError(
                f"layer {layer.index} scales its logits by {layer.module.scaling}, and llama.cpp "
                f"by {usual:g}: use llama.cpp's own converter."
            )
    if not bias:
        _refuse_changing(rope_entry(text_config(model))[0])


def _is_bias(rule: Any, identity: bool) -> bool:
    """Whether a rule is ALiBi's biases with its own slopes, in place of a rotary."""
    if not isinstance(rule, LinearBias) or not identity:
        return False
    wanted = _refact_slopes(len(rule.slopes))
    return all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(rule.slopes, wanted, strict=True))


def _refact_slopes(heads: int) -> list[float]:
    """What llama.cpp takes for a largest bias of 8, which `refact` has."""
    power = 1 << (heads.bit_length() - 1)
    one, other = 2.0 ** (-8 / power), 2.0 ** (-4 / power)
    return [one ** (h + 1) if h < power else other ** (2 * (h - power) + 1) for h in range(heads)]


def _refuse_changing(entry: Mapping[str, Any]) -> None:
    """Refuse scaling of the checkpoint's own that depends on the length."""
    kind = str(entry.get("rope_type", "default"))
    by_length = "dynamic" in kind
    if kind == "longrope" and entry.get("short_factor") != entry.get("long_factor"):
        by_length = True
    if by_length:
        raise ModelError(
            f"the checkpoint's own {kind!r} scaling has other frequencies for other lengths, and a "
            "GGUF file one for each plane: extend it by a static method with --replace, or use "
            "llama.cpp's own converter."
        )


def _divided(rope: Rope, frequencies: Frequencies) -> Layout:
    """Any frequencies at all: the original base, and a divisor for each plane."""
    divisors = rope.inv_freq() / frequencies.inv_freq
    keys: dict[str, float] = {"freq_base": rope.theta}
    if frequencies.attention_scaling != 1.0:
        keys["scaling.attn_factor"] = frequencies.attention_scaling
    changed = not bool(((divisors - 1).abs() < 1e-6).all())
    return Layout("llama", permuted=True, rope=keys, divisors=divisors.float() if changed else None)


def _computed(
    model: PreTrainedModel, rope: Rope, frequencies: Frequencies
) -> dict[str, float | int | str]:
    """The keys by which llama.cpp computes these frequencies itself.

    Raises:
        ModelError: it has no formula for them.
    """
    entry = rope_entry(text_config(model))[0]
    kind, factor = str(entry.get("rope_type", "default")), float(entry.get("factor") or 1)
    keys: dict[str, float | int | str] = {"freq_base": float(entry["rope_theta"])}
    own = rope.inv_freq(float(entry["rope_theta"]))
    computed, temperature = own, 1.0
    if kind == "linear":
        keys |= {"scaling.type": "linear", "scaling.factor": factor}
        computed = own / factor
    elif kind == "yarn":
        keys |= {
            "scaling.type": "yarn",
            "scaling.factor": factor,
            "scaling.original_context_length": rope.length,
        }
        kept = _kept(rope)
        computed, temperature = (1 - kept) * own / factor + kept * own, 0.1 * math.log(factor) + 1
    off = float((computed / frequencies.inv_freq - 1).abs().max())
    if off > _CLOSE:
        raise ModelError(
            f"model type {text_config(model).model_type!r}: llama.cpp reads no divisors of "
            f"frequencies for it, and computes none of these itself (rope_type {kind!r}, off by up "
            f"to {off:.2g}): extend it by yarn or ntk_by_parts with their usual betas, linear, ntk "
            "or abf, or serve it by vLLM."
        )
    attention = frequencies.attention_scaling / temperature
    if abs(attention - 1) > 1e-7:
        keys["scaling.attn_factor"] = attention
    return keys


def _kept(rope: Rope) -> Tensor:
    """The share of its own frequency that llama.cpp leaves each plane under YaRN, float64 [d/2].

    The betas are always 32 and 1: it reads them from the file for other architectures alone.
    """

    def plane(turns: float) -> float:
        span = rope.length / (turns * 2 * math.pi)
        return rope.dim * math.log(span) / (2 * math.log(rope.theta))

    low = max(0, math.floor(plane(32)))
    high = min(rope.dim - 1, math.ceil(plane(1)))
    index = torch.arange(rope.dim // 2, dtype=torch.float64)
    return 1 - ((index - low) / max(0.001, high - low)).clamp(0, 1)


def tensors_of(model: PreTrainedModel, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its name in GGUF, float32 on the CPU, in llama.cpp's order of rows.

    Raises:
        ModelError: a tensor that the architecture has no place for.
    """
    config = text_config(model)
    heads = {
        "attn_q": int(config.num_attention_heads),
        "attn_k": int(config.num_key_value_heads),
    }
    head: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings()
    tied = head is not None and torch.equal(head.weight, table.weight)  # whatever the config says
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        found = _PLACE.fullmatch(name)
        place = _NAMES.get(found[2]) if found else None
        odd = place is None or (place.startswith("output") and found is not None and found[1])
        if found is None or odd or (layout.architecture == "refact" and found[3] == "bias"):
            raise ModelError(
                f"tensor {name} has no place in llama.cpp's architecture {layout.architecture!r}: "
                "use llama.cpp's own converter, or serve the model by transformers or vLLM."
            )
        value = tensor.detach().float().cpu()
        if layout.permuted and place in heads:
            value = _neighbours(value, heads[place])
        block = "" if found[1] is None else f"blk.{found[1]}."
        yield f"{block}{place}.{found[3]}", value
    if layout.divisors is not None:
        yield "rope_freqs.weight", layout.divisors


def _neighbours(value: Tensor, heads: int) -> Tensor:
    """The rows of each head with the two channels of a plane side by side."""
    return rearrange(value, "(h two half) ... -> (h half two) ...", h=heads, two=2)
