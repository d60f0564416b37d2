"""Key/value heads: where a model keeps them, how alike they are, and turning them towards others.

Two things can be done to a key/value head that leave the model's logits as they are, since the
other side of the product takes them back:

    v → R v,  W_o → W_o Rᵀ     any rotation R of the head's channels
    k → P k,  q → P q          rotations P that commute with RoPE: each plane by a phase of its own
                               (and anything among channels that RoPE does not turn)

So heads that say the same in other words can be brought to say it in one, before they are averaged.

Source: Jin et al. 2024, Align Attention Heads Before Merging Them (arXiv:2412.20677), section 3.

Legend: K kv heads, G query heads to each, D head dim, M hidden size, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel

from longctx.attention.layers import attention_layers
from longctx.attention.turning import Rotation
from longctx.errors import ModelError
from longctx.model import rope_entry, text_config

__all__ = ["Alignment", "HeadLayer", "Planes", "align", "grouped", "head_layers", "residual"]

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_ROUNDS = 8
"""Times that the heads of a group are turned to their mean, which then moves."""


@dataclass(frozen=True, slots=True)
class HeadLayer:
    """The attention of one layer, in heads."""

    index: int
    module: Any
    heads: int
    """Key/value heads."""
    dim: int
    """Of a head, in channels."""
    normed: bool
    """Whether keys pass a norm of their own before RoPE, which phases would not commute with."""


@dataclass(frozen=True, slots=True)
class Planes:
    """Which channels of a key RoPE turns together."""

    first: Tensor
    """Of each plane, int [planes]."""
    second: Tensor
    free: Tensor
    """Channels that it does not turn."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """How the heads of a layer are turned and put in groups."""

    order: tuple[int, ...]
    """Key/value heads, those of a group next to each other."""
    values: Tensor
    """R of each head, in the model's order, float64 [K, D, D]."""
    keys: Tensor
    """P of each head."""


def head_layers(model: PreTrainedModel, who: str) -> list[HeadLayer]:
    """The attention of all layers.

    Raises:
        ModelError: the family keeps its heads in another way, which is named.
    """
    config: Any = text_config(model)
    heads = int(config.num_attention_heads)
    kv_heads = getattr(config, "num_key_value_heads", None)
    found: list[HeadLayer] = []
    for layer in attention_layers(model):
        module: Any = layer.module
        parts = dict(module.named_children())
        own = [name for name, _ in module.named_parameters(recurse=False)]
        odd = [name for name in _LINEAR if not isinstance(parts.get(name), nn.Linear)]
        strange = [
            name
            for name, part in parts.items()
            if name not in (*_LINEAR, *_NORMS) and any(True for _ in part.parameters())
        ]
        what = ""
        if odd:
            what = f"no linear {', '.join(odd)} (it has {', '.join(parts)})"
        elif own or strange:
            what = f"{', '.join([*own, *strange])} beside its projections"
        elif kv_heads is None:
            what = "no num_key_value_heads in its config"
        else:
            dim = module.q_proj.out_features // heads
            norm: Any = parts.get("k_norm")
            weight = None if norm is None else next(norm.parameters(), None)
            widths = module.k_proj.out_features, module.v_proj.out_features
            if widths != (kv_heads * dim, kv_heads * dim):
                what = f"keys and values of {widths} channels for {kv_heads} heads of {dim}"
            elif weight is not None and weight.numel() != dim:
                what = f"a norm over all of its heads ({weight.numel()} channels)"
            else:
                found.append(HeadLayer(layer.index, module, kv_heads, dim, norm is not None))
        if what:
            raise ModelError(
                f"{who} joins key/value heads, and the attention of model type "
                f"{config.model_type!r}, layer {layer.index}, has {what}: expected q_proj, k_proj, "
                "v_proj and o_proj in heads (Llama, Mistral, Qwen2, Qwen3, Gemma, Cohere, …)."
            )
    return found


def planes_in(model: PreTrainedModel, layer: HeadLayer) -> Planes | None:
    """The planes of a layer's keys; None where the model pairs channels in a way of its own."""
    _, layer_type = rope_entry(text_config(model))
    rotation = Rotation(model, layer_type, layer.module)
    width = len(rotation.planes)
    channels = torch.arange(width)
    free = torch.arange(width, layer.dim)
    if rotation.pairing == "halves":
        return Planes(channels[: width // 2], channels[width // 2 :], free)
    if rotation.pairing == "neighbours":
        return Planes(channels[::2], channels[1::2], free)
    return None


def align(keys: Tensor, values: Tensor, kv_heads: int, planes: Planes | None) -> Alignment:
    """Put heads in groups of those most alike, and turn each to its group's mean.

    Args:
        keys: before RoPE, float64 [K, N, D].
        values: float64 [K, N, D].
        kv_heads: groups, all of one size.
        planes: in which keys may be turned; None to leave them.
    """
    likeness = _likeness(values, None) + _likeness(keys, planes)
    groups = grouped(likeness, kv_heads)
    turned_values, turned_keys = (
        torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).repeat(len(x), 1, 1)
        for x in (values, keys)
    )
    for group in groups if len(groups) < len(keys) else ():
        turned_values[group] = _to_mean(values[group], None)
        if planes is not None:
            turned_keys[group] = _to_mean(keys[group], planes)
    return Alignment(tuple(i for group in groups for i in group), turned_values, turned_keys)


def residual(vectors: Tensor, turns: Tensor, groups: Sequence[Sequence[int]]) -> float:
    """Share of the vectors' energy that averaging the heads of each group loses.

    Args:
        vectors: keys or values [K, N, D].
        turns: of each head, [K, D, D].
        groups: heads that become one.
    """
    turned = torch.einsum("knd,ked->kne", vectors, turns)
    lost = sum(float((turned[g] - turned[g].mean(0)).square().sum()) for g in map(list, groups))
    energy = float(vectors.square().sum())
    return lost / energy if energy else 0.0


def _to_mean(heads: Tensor, planes: Planes | None) -> Tensor:
    """Turn each of the heads [g, N, D] to their mean, again and again: [g, D, D]."""
    turns = torch.eye(heads.shape[-1], dtype=heads.dtype, device=heads.device).repeat(
        len(heads), 1, 1
    )
    mean = heads[0]  # the plain mean of heads that say the same in other words is about nothing
    for _ in range(_ROUNDS):
        products = torch.einsum("gnd,ne->gde", heads, mean)
        turns = torch.stack([_turn(product, planes) for product in products])
        mean = torch.einsum("gnd,ged->gne", heads, turns).mean(0)
    return turns


def _turn(product: Tensor, planes: Planes | None) -> Tensor:
    """The rotation T that brings x nearest to y, from Σ x yᵀ [D, D]: T x ≈ y."""
    if planes is None:
        left, _, right = torch.linalg.svd(product)
        return (left @ right).T
    turn = torch.eye(len(product), dtype=product.dtype, device=product.device)
    a, b = planes.first, planes.second
    phase = torch.atan2(product[a, b] - product[b, a], product[a, a] + product[b, b])
    turn[a, a] = turn[b, b] = phase.cos()
    turn[b, a], turn[a, b] = phase.sin(), -phase.sin()
    if len(free := planes.free):
        turn[free[:, None], free] = _turn(product[free[:, None], free], None)
    return turn


def _likeness(heads: Tensor, planes: Planes | None) -> Tensor:
    """How much of two heads is the same once one is turned to the other, 0 to 1: [K, K]."""
    products = torch.einsum("knd,lne->klde", heads, heads)
    size = heads.square().sum((1, 2)).sqrt()
    found = torch.eye(len(heads), dtype=heads.dtype)
    for k in range(len(heads)):
        for other in range(k):
            product = products[k, other]
            both = float(size[k] * size[other])
            shared = float((_turn(product, planes).T * product).sum())
            found[k, other] = found[other, k] = shared / both if both else 0.0
    return found


def grouped(likeness: Tensor, groups: int) -> list[list[int]]:
    """Share out heads among groups of one size, alike ones together.

    Heads change places between groups for as long as that makes the members more alike.

    >>> grouped(torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]]), 3)
    [[0], [1], [2]]
    """
    size = len(likeness) // groups
    found = [list(range(first, first + size)) for first in range(0, len(likeness), size)]
    score = likeness.tolist()

    def gain(one: list[int], i: int, other: list[int], j: int) -> float:
        x, y = one[i], other[j]
        leave = sum(score[x][z] for z in one if z != x) + sum(score[y][z] for z in other if z != y)
        join = sum(score[y][z] for z in one if z != x) + sum(score[x][z] for z in other if z != y)
        return join - leave

    while size > 1 and groups > 1:
        swaps = [
            (gain(one, i, other, j), n, i, m, j)
            for n, one in enumerate(found)
            for m, other in enumerate(found[:n])
            for i in range(size)
            for j in range(size)
        ]
        best, n, i, m, j = max(swaps)
        if best <= 1e-9:
            break
        found[n][i], found[m][j] = found[m][j], found[n][i]
    return sorted(sorted(group) for group in found)


def aligned_weights(layer: HeadLayer, alignment: Alignment) -> dict[str, Tensor]:
    """The layer's weights with the heads turned and in their groups' order, by name.

    What they compute is what the layer computes.
    """
    order = list(alignment.order)
    module, heads, dim = layer.module, layer.heads, layer.dim
    found: dict[str, Tensor] = {}
    for name, turns in (
        ("q_proj", alignment.keys),
        ("k_proj", alignment.keys),
        ("v_proj", alignment.values),
    ):
        for key, weight in getattr(module, name).named_parameters():
            rows = rearrange(weight.double(), "(k g d) ... -> k g d ...", k=heads, d=dim)
            rows = torch.einsum("ked,kgd...->kge...", turns, rows)[order]
            rows = rearrange(rows, "k g d ... -> (k g d) ...")
            found[f"{name}.{key}"] = rows.to(weight.dtype)
    weight = module.o_proj.weight
    columns = rearrange(weight.double(), "m (k g d) -> m k g d", k=heads, d=dim)
    columns = torch.einsum("mkgd,ked->mkge", columns, alignment.values)[:, order]
    found["o_proj.weight"] = rearrange(columns, "m k g d -> m (k g d)").to(weight.dtype)
    if module.o_proj.bias is not None:
        found["o_proj.bias"] = module.o_proj.bias
    return found


def pooled(weights: dict[str, Tensor], layer: HeadLayer, kv_heads: int) -> dict[str, Tensor]:
    """The same with the key and value heads of each group averaged (Ainslie et al. 2023)."""
    found = dict(weights)
    for name, weight in weights.items():
        if name.startswith(("k_proj", "v_proj")):
            rows = rearrange(weight.double(), "(n s d) ... -> n s d ...", n=kv_heads, d=layer.dim)
            rows = rearrange(rows.mean(1), "n d ... -> (n d) ...")
            found[name] = rows.to(weight.dtype)
    return found
