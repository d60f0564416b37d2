"""Trying on a model whether its queries can be turned further, layer by layer.

Two short passes: one as the model is, and one in which queries and keys are turned by half their
positions and then by the other half. Where both give a layer the same queries, turning is
understood. A layer without a rotary (NoPE) gives the same queries before the second turn.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..errors import ModelError
from ..model import text_config
from .hook import ATTRIBUTE, NAME, SCALE, AttentionRule, register
from .layers import AttentionLayer
from .turning import Framing, Rotation

__all__ = ["Probe", "framings_on", "probe_turning"]

_TOKENS = 8
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest rms difference of the queries over their rms; phases of the model are float32."""
_SHORT_TOLERANCE = 2e-2


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found."""

    turning: tuple[AttentionLayer, ...]
    """Layers whose queries and keys are turned by the rotary."""
    still: tuple[AttentionLayer, ...]
    """Layers that turn nothing."""
    difference: float
    """Largest rms difference over the rms of a layer's queries."""


def probe_turning(
    model: PreTrainedModel, layers: Sequence[AttentionLayer], rotation: Rotation
) -> Probe:
    """Say which layers turn their queries by the rotary, and that turning them further works.

    Args:
        model: in any mode; nothing of it is changed.
        layers: to try.
        rotation: of these layers.

    Raises:
        ModelError: a layer turns its queries in another way, or cannot be reached.
    """
    native: dict[int, Tensor] = {}
    halves: dict[int, tuple[Tensor, Tensor]] = {}
    framing = Framing(rotation, lambda positions: positions / 2)
    with ExitStack() as borrowed:
        borrowed.enter_context(torch.random.fork_rng())  # the same dropout in both
        for own in _framings(layers):
            borrowed.enter_context(own.suspended())
        _pass(model, {layer: _Recorder(layer.index, native) for layer in layers})
        for layer in layers:
            handle = layer.module.register_forward_pre_hook(framing, with_kwargs=True)
            borrowed.callback(handle.remove)
        rules = {layer: _HalfTurn(layer.index, rotation, native, halves) for layer in layers}
        _pass(model, rules)
    turning: list[AttentionLayer] = []
    still: list[AttentionLayer] = []
    largest = 0.0
    for layer in layers:
        if layer.index not in native or layer.index not in halves:
            raise ModelError(
                f"layer {layer.index} of model type {model.config.model_type!r} did not attend "
                "through transformers' attention interface: methods that change distances cannot "
                "reach it."
            )
        wanted = native[layer.index]
        unturned, turned = (_difference(found, wanted) for found in halves[layer.index])
        limit = _TOLERANCE.get(wanted.dtype, _SHORT_TOLERANCE)
        (turning if turned <= unturned else still).append(layer)
        difference = min(turned, unturned)
        largest = max(largest, difference)
        if not difference <= limit:
            raise ModelError(
                f"layer {layer.index} of model type {model.config.model_type!r} turns its queries "
                f"in a way of its own: turned half-way twice they differ by {difference:.1e} of "
                "their size. Methods that change distances cannot serve it; those that change "
                "frequencies may."
            )
    return Probe(tuple(turning), tuple(still), largest)


def _framings(layers: Sequence[AttentionLayer]) -> set[Framing]:
    return {hook for layer in layers for hook in framings_on(layer.module)}


def framings_on(module: nn.Module) -> list[Framing]:
    """The framings that are hooked on an attention module."""
    hooks = module._forward_pre_hooks.values()  # pyright: ignore[reportPrivateUsage]
    return [hook for hook in hooks if isinstance(hook, Framing)]


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().norm() / wanted.double().norm().clamp(min=1e-30))


def _pass(model: PreTrainedModel, rules: Mapping[AttentionLayer, AttentionRule]) -> None:
    """One short pass under these rules, near position 0, where the model's phases are exact."""
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    ids = torch.arange(_TOKENS, device=device)[None] % text_config(model).vocab_size
    where = torch.arange(_TOKENS, 2 * _TOKENS, device=device)[None]
    torch.manual_seed(0)
    with _borrowed(model, rules), torch.no_grad():
        model(input_ids=ids, position_ids=where, use_cache=False)


@contextmanager
def _borrowed(
    model: PreTrainedModel, rules: Mapping[AttentionLayer, AttentionRule]
) -> Generator[None]:
    """Put rules on layers for a block."""
    register()
    config: Any = text_config(model)
    attention = config._attn_implementation_internal
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for layer, rule in rules.items():
            for name, value in ((ATTRIBUTE, rule), (SCALE, None)):
                before.append((layer.module, name, getattr(layer.module, name, None)))
                setattr(layer.module, name, value)
        config._attn_implementation_internal = NAME
        yield
    finally:
        config._attn_implementation_internal = attention
        for module, name, value in before:
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Plain attention that remembers the queries of one layer."""

    index: int
    queries: dict[int, Tensor]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        self.queries[self.index] = q
        return _causal(q, k, v, settings["scaling"])


@dataclass(frozen=True, slots=True)
class _HalfTurn:
    """Plain attention after the other half of the turn, where the layer turns at all."""

    index: int
    rotation: Rotation
    native: dict[int, Tensor]
    queries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        phases = self.rotation.phases(settings["positions"][0].double() / 2)
        turned = self.rotation.turn(q, phases)
        self.queries[self.index] = q, turned
        wanted = self.native[self.index]
        if _difference(turned, wanted) < _difference(q, wanted):
            q, k = turned, self.rotation.turn(k, phases)
        return _causal(q, k, v, settings["scaling"])


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    return functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
