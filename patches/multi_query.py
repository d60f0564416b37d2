"""Fewer key/value heads (GQA, MQA): a smaller cache, for a model that has to be trained on.

    k' = mean of P_h k_h,  v' = mean of R_h v_h   over the heads h of a group

Heads of a group are turned to one another before they are averaged, in ways that leave the logits
as they are: values by any rotation, taken back in the output projection; keys by a phase in each
plane of RoPE, with their queries (`_kv_heads.py`). Which heads make a group, and how they are
turned, is read off the keys and values of a calibration text. The turned model is run, and has the
logits of the original. Where keys pass a norm (Qwen3, Gemma-3) they are averaged as they stand.

When to use it: the cache is what limits you, and you can train afterwards. Aligned heads need about
half the tokens of plainly averaged ones to come back; retrieval comes back only if the training
asks for it (`longctx train --recipe uptrain`). Several heads cost little where one costs much.

Sources: Ainslie et al. 2023, GQA (arXiv:2305.13245), section 2.1: the mean; Shazeer 2019
(arXiv:1911.02150): one head; Jin et al. 2024 (arXiv:2412.20677), section 3: the alignment.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from longctx.conversion import Calibration, Conversion
from longctx.errors import MethodError
from longctx.patch import Check
from longctx.twin import build_with_weights

from ._kv_heads import (
    Alignment,
    HeadLayer,
    Planes,
    align,
    aligned_weights,
    head_layers,
    planes_in,
    pooled,
    residual,
)

__all__ = ["METHOD", "MultiQuery"]


@dataclass(frozen=True, slots=True)
class MultiQuery(Conversion):
    """Key/value heads averaged in groups, aligned before."""

    kv_heads: int = 1
    """Key/value heads of the new model; a divisor of those that there are."""
    align: bool = True
    """Group heads by likeness and turn them to one another, instead of averaging neighbours as
    they stand."""

    name: ClassVar[str] = "multi_query"
    slots: ClassVar[tuple[str, ...]] = ("weights",)
    calibrates: ClassVar[bool] = True
    training: ClassVar[str] = (
        "all of it is off now; train the attention at least, on text and on retrieval prompts "
        "(longctx train --recipe uptrain --teacher ORIGINAL)"
    )

    def __post_init__(self) -> None:
        if type(self.kv_heads) is not int or self.kv_heads < 1:
            raise MethodError(f"{self.name}: kv_heads={self.kv_heads!r}: expected 1 or more.")

    def convert(
        self, model: PreTrainedModel, calibration: Calibration | None
    ) -> tuple[PreTrainedModel, Sequence[Check]]:
        """Align, check that the logits are as they were, average."""
        assert calibration is not None
        ids = calibration.ids
        layers = head_layers(model, self.name)
        heads = layers[0].heads
        if heads % self.kv_heads or heads == self.kv_heads:
            fitting = [n for n in range(1, heads) if heads % n == 0]
            raise MethodError(
                f"{self.name}: kv_heads={self.kv_heads} and the model's {heads}: expected fewer, "
                f"that divide them ({', '.join(map(str, fitting)) or 'there are none'})."
            )
        checks: list[Check] = []
        aligned: dict[int, dict[str, Tensor]] = {}

        def take(layer: HeadLayer, keys: Tensor, values: Tensor) -> None:
            planes = None if layer.normed else planes_in(model, layer)
            alignment = self._alignment(layer, keys, values, planes)
            aligned[layer.index] = aligned_weights(layer, alignment)
            checks.append(self._lost(layer, keys, values, alignment))

        read_heads(model, layers, ids, take)
        if self.align:
            checks.insert(0, _unmoved(model, layers, aligned, ids))
        weights = dict(model.state_dict())
        prefixes = {id(module): name for name, module in model.named_modules()}
        for layer in layers:
            prefix = prefixes[id(layer.module)]
            found = pooled(aligned[layer.index], layer, self.kv_heads)
            weights |= {f"{prefix}.{name}": weight for name, weight in found.items()}
        config = copy.deepcopy(model.config)
        config.get_text_config(decoder=True).num_key_value_heads = self.kv_heads
        weights = {name: weight.clone() for name, weight in weights.items()}
        return build_with_weights(type(model), config, weights, dict(model.named_buffers())), checks

    def _alignment(
        self, layer: HeadLayer, keys: Tensor, values: Tensor, planes: Planes | None
    ) -> Alignment:
        if self.align:
            return align(keys, values, self.kv_heads, planes)
        still = torch.eye(layer.dim, dtype=keys.dtype, device=keys.device)
        still = still.repeat(layer.heads, 1, 1)
        return Alignment(tuple(range(layer.heads)), still, still)

    def _lost(self, layer: HeadLayer, keys: Tensor, values: Tensor, alignment: Alignment) -> Check:
        size = layer.heads // self.kv_heads
        order = alignment.order
        groups = [order[first : first + size] for first in range(0, layer.heads, size)]
        still = torch.eye(layer.dim, dtype=keys.dtype, device=keys.device)
        still = still.repeat(layer.heads, 1, 1)
        lost = [
            f"{what} {residual(vectors, turns, groups):.0%} "
            f"({residual(vectors, still, groups):.0%} unaligned)"
            for what, vectors, turns in (
                ("keys", keys, alignment.keys),
                ("values", values, alignment.values),
            )
        ]
        heads = "+".join(",".join(map(str, group)) for group in groups)
        detail = f"heads {heads}; lost of {' and of '.join(lost)}"
        return Check(f"layer {layer.index}", True, detail)


def read_heads(
    model: PreTrainedModel,
    layers: Sequence[HeadLayer],
    ids: Tensor,
    take: Callable[[HeadLayer, Tensor, Tensor], None],
) -> None:
    """Read a text and hand over each layer's keys and values, float64 [K, N, D], one by one."""
    held: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            del module, args
            held[name] = output

        return hook

    def hand_over(layer: HeadLayer) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            del module, args, output
            shape = "b n (k d) -> k (b n) d"
            keys, values = (
                rearrange(held.pop(name), shape, k=layer.heads).double()
                for name in ("k_proj", "v_proj")
            )
            take(layer, keys, values)

        return hook

    handles = [
        handle
        for layer in layers
        for handle in (
            layer.module.k_proj.register_forward_hook(keep("k_proj")),
            layer.module.v_proj.register_forward_hook(keep("v_proj")),
            layer.module.register_forward_hook(hand_over(layer)),
        )
    ]
    try:
        body: Any = model.base_model
        body(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _unmoved(
    model: PreTrainedModel,
    layers: Sequence[HeadLayer],
    aligned: dict[int, dict[str, Tensor]],
    ids: Tensor,
) -> Check:
    """Whether the model with its heads turned, and not yet averaged, has the same logits."""
    short = ids[:1, :64]
    wanted = model(input_ids=short, use_cache=False).logits.float()
    kept = {
        (layer.index, name): layer.module.get_parameter(name).data
        for layer in layers
        for name in aligned[layer.index]
    }
    try:
        for layer in layers:
            for name, weight in aligned[layer.index].items():
                layer.module.get_parameter(name).data = weight
        found = model(input_ids=short, use_cache=False).logits.float()
    finally:
        for layer in layers:
            for name in aligned[layer.index]:
                layer.module.get_parameter(name).data = kept[layer.index, name]
    off = float((found - wanted).abs().max() / wanted.abs().max())
    limit = 2e-5 if model.dtype.itemsize >= 4 else 5e-2
    return Check(
        "heads aligned, not yet averaged", off <= limit, f"logits move by {off:.1e} of the largest"
    )


METHOD = MultiQuery
