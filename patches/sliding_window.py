"""A sliding window in most layers: their cache stops growing, and the layers that find things stay.

    layer l sees the last W tokens, the query's own among them, for l not in K; all for l in K

No weight changes. What keys lose first under a window is what lies behind it, and a few layers do
most of the finding: `keep="auto:N"` gives one layer at a time the window, asks for keys hidden in
text, and keeps the N that are missed most.

The model becomes one of transformers' own whose config says which layers slide: Ministral (from
Llama, Mistral), or its own family (Ministral, Qwen2, Qwen3, SmolLM3). Other families are refused by
name: in some a layer that slides has other positions too (Gemma-3, Cohere-2, OLMo-3).

When to use it: the cache of many layers is what limits the batch or the length, and what has to be
found is found by few of them. Measure keys and perplexity, at the lengths that count, before and
after: text that no key was asked for is not in the choice.

Sources: Beltagy et al. 2020, Longformer (arXiv:2004.05150), section 3.1, the window; Chen et al.
2026, HALO (arXiv:2601.22156), layers chosen by what recall loses.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longctx.attention.layers import attention_in_use, attention_layers
from longctx.conversion import Calibration, Conversion, entries_of_family
from longctx.errors import MethodError, ModelError
from longctx.model import window
from longctx.patch import Check
from longctx.twin import build_with_weights

from ._kept_layers import checked_keep, chosen, loss_of_keys, lost_without, refuse_keep

__all__ = ["METHOD", "SlidingWindow"]

_BECOMES = {
    "llama": "ministral",
    "mistral": "ministral",
    "ministral": "ministral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
"""What a family becomes: one whose config says which layers slide, and whose layers differ in
nothing else by it."""
_NOTHING = 0.01  # nats a token
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class SlidingWindow(Conversion):
    """The last tokens alone are seen, but for some layers that see all."""

    window: int = 1024
    """Last tokens that a layer sees, the query's own among them."""
    keep: tuple[int, ...] | str = ()
    """Layers that see all, by index from 0; or "auto:N", the N whose window costs keys most.
    Without any, nothing behind the window is found."""

    name: ClassVar[str] = "sliding_window"
    slots: ClassVar[tuple[str, ...]] = ("weights",)
    training: ClassVar[str] = (
        "nothing for texts within the window; beyond it the kept layers alone see further back: "
        "measure keys (longctx sweep), and train where they are missing "
        "(longctx train --recipe uptrain --teacher ORIGINAL)"
    )

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 2:
            raise MethodError(f"{self.name}: window={self.window!r}: expected 2 tokens or more.")
        object.__setattr__(self, "keep", checked_keep(self.name, self.keep))

    @property
    def same_within(self) -> int:
        """Inside the first window all layers see all."""
        return self.window

    @property
    def asks_for_keys(self) -> bool:
        """Layers are chosen by what keys lose."""
        return isinstance(self.keep, str)

    def convert(
        self, model: PreTrainedModel, calibration: Calibration | None
    ) -> tuple[PreTrainedModel, Sequence[Check]]:
        """Choose the layers to keep, and build the model with windows in the others."""
        full = self._full_layers(model)
        lost: dict[int, float] = {}
        if self.asks_for_keys:
            assert calibration is not None

            @contextmanager
            def replaced(layers: Sequence[int]) -> Generator[PreTrainedModel]:
                kept = [index for index in full if index not in layers]
                made = self._with_windows(model, kept)
                made.set_attn_implementation(attention_in_use(model) or "sdpa")
                yield made

            lost = lost_without(full, replaced, calibration.prompts)
            if max(lost.values()) < _NOTHING:
                raise MethodError(
                    f"{self.name}: a window of {self.window} in any one layer costs the keys of "
                    f"{len(calibration.prompts[0].input_ids):,} tokens nothing: name the layers, "
                    "or take a smaller window."
                )
        kept = chosen(self.keep, lost)
        made = copy.deepcopy(self._with_windows(model, kept))
        checks = [
            Check("family", True, f"{model.config.model_type} → {made.config.model_type}"),
            Check(
                "layers that see all",
                True,
                f"{len(kept)} of {len(full)}: {', '.join(map(str, kept)) or 'none'}",
            ),
        ]
        for index, nats in lost.items():
            said = "sees all" if index in kept else "slides"
            detail = f"{said}; {loss_of_keys(nats)} by its window"
            checks.append(Check(f"layer {index}", True, detail))
        return made, checks

    def _full_layers(self, model: PreTrainedModel) -> list[int]:
        """Layers of full attention.

        Raises:
            ModelError: another family or class, or layers that slide over another window.
            MethodError: a window or layers that the model does not have.
        """
        kind = model.config.model_type
        if kind not in _BECOMES:
            raise ModelError(
                f"{self.name}: model type {kind!r} is not one of those of which it is known that "
                f"layers that slide differ in nothing else: expected {', '.join(_BECOMES)}."
            )
        build: Any = AutoModelForCausalLM._model_mapping[type(model.config)]  # pyright: ignore[reportPrivateUsage]
        if type(model) is not build:
            raise ModelError(
                f"{self.name}: {type(model).__name__} is not a decoder with a head for tokens: "
                "load it by longctx.load."
            )
        length = window(model)
        if length is not None and self.window >= length:
            raise MethodError(
                f"{self.name}: window={self.window} and the model's {length:,}: expected fewer "
                "tokens."
            )
        layers = attention_layers(model)
        full = [layer.index for layer in layers if layer.full]
        other = {layer.window for layer in layers if not layer.full} - {self.window}
        if other or not full:
            raise ModelError(
                f"{self.name}: layers of this {kind!r} model slide over "
                f"{', '.join(map(str, sorted(map(str, other)))) or self.window} tokens already, "
                "and a config has one window: expected that one, and layers that see all."
            )
        refuse_keep(self.name, self.keep, full)
        return full

    def _with_windows(self, model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
        """The model with windows in all layers but those, on the very weights of the original."""
        config = self._config(model, kept)
        build: Any = AutoModelForCausalLM._model_mapping[type(config)]  # pyright: ignore[reportPrivateUsage]
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        made = build_with_weights(build, config, weights, dict(model.named_buffers()))
        sees = [layer.index for layer in attention_layers(made) if layer.full]
        if sees != sorted(kept):
            raise ModelError(
                f"{self.name}: layers {sees} of a {config.model_type!r} model would see all, where "
                f"{sorted(kept)} were to."
            )
        return made

    def _config(self, model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedConfig:
        own: Any = model.config
        kinds = [_FULL if i in kept else _SLIDING for i in range(len(attention_layers(model)))]
        said: dict[str, Any] = {"sliding_window": self.window, "layer_types": kinds}
        family = _BECOMES[own.model_type]
        if family != own.model_type:
            entries = {**entries_of_family(own, family), **said}
            return AutoConfig.for_model(family, **entries, dtype=model.dtype)
        config = copy.deepcopy(own)
        if hasattr(config, "use_sliding_window"):
            said["use_sliding_window"] = True
        for key, value in said.items():
            setattr(config, key, value)
        return config


METHOD = SlidingWindow
