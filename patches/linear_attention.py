"""Linear attention (experimental): a cache of fixed size, for a model that has to be trained on.

    out_i = softmax attention over the last W tokens + φ_q(q_i) Σ φ_k(k_j) v_jᵀ over all before them

in one sum with one normaliser (`longctx.attention.linear` has the formula). φ(x) = softmax([W x,
−W x]) are Hedgehog's features, learnt, of queries and keys that RoPE has turned already. Tokens
behind the window are kept as a sum, [heads, features, head_dim] in float32 for each layer, so that
memory and time of a token do not grow with the text.

Each layer's features are fitted to what its softmax attention gives on a calibration text
(attention transfer), which changes no other weight. Then the model has to be trained by its
original (`longctx train --recipe uptrain`).

Layers in `keep` stay as they are, with a cache that grows: what linear attention loses first is
finding things, and a few layers do most of the finding. `keep="auto:1"` replaces one layer at a
time, asks for keys hidden in text, and keeps that which is missed most.

Three forms agree: quadratic (`longctx.attention.reference`), recurrent (decoding) and chunked
(prompts and training).

When to use it: as an experiment. Without kept layers it finds next to no keys, and in our table a
window without features did better than one with them (docs/conversions.md).

Sources: Zhang et al. 2024, Hedgehog (arXiv:2402.04347), section 4, the features; Zhang et al. 2024,
LoLCATs (arXiv:2410.10254), section 3, window and transfer; Chen et al. 2026, HALO
(arXiv:2601.22156), layers chosen by what recall loses.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from longctx.attention.hook import ATTRIBUTE
from longctx.attention.layers import (
    attention_layers,
    put_rules,
    refuse_features,
)
from longctx.attention.state_cache import StateCaching
from longctx.conversion import Calibration, Conversion, put_record
from longctx.errors import MethodError, ModelError
from longctx.model import decoder_of, text_config, window
from longctx.patch import Check

from ._hedgehog import Fitting, HedgehogAttention
from ._kept_layers import checked_keep, chosen, loss_of_keys, lost_without, refuse_keep

__all__ = ["METHOD", "LinearAttention"]

_FORMS = 1e-10
"""Largest difference of the three forms, in float64, that is rounding."""
_PARTS = ("query", "key", "gate")


@dataclass(frozen=True, slots=True)
class LinearAttention(Conversion):
    """Softmax over a window, learnt features for everything older, some layers as they are."""

    window: int = 64
    """Last tokens that are seen by softmax, the query's own among them; 0 for features alone."""
    features: int | None = None
    """Features of a head, even; by default twice its channels."""
    keep: tuple[int, ...] | str = ()
    """Layers that stay as they are, by index from 0; or "auto:N", the N whose replacement costs
    keys most."""
    steps: int = 40
    """Updates of the features of each layer on the calibration text; 0 for none."""

    name: ClassVar[str] = "linear_attention"
    slots: ClassVar[tuple[str, ...]] = ("weights",)
    calibrates: ClassVar[bool] = True
    plain_loadable: ClassVar[bool] = False
    training: ClassVar[str] = (
        "experimental: features are fitted layer by layer, and the layers not to one another; "
        "train all of it on text and on retrieval prompts (longctx train --recipe uptrain "
        "--teacher ORIGINAL), and measure keys"
    )

    def __post_init__(self) -> None:
        for field, least in (("window", 0), ("steps", 0), ("features", 2)):
            value = getattr(self, field)
            if (value is None and field == "features") or (type(value) is int and value >= least):
                continue
            raise MethodError(f"{self.name}: {field}={value!r}: expected {least} or more.")
        if self.features is not None and self.features % 2:
            raise MethodError(
                f"{self.name}: features={self.features}: expected an even number, since they come "
                "as W x and −W x."
            )
        object.__setattr__(self, "keep", checked_keep(self.name, self.keep))

    @property
    def same_within(self) -> int:
        """Inside the first window there is nothing but softmax attention."""
        return self.window

    @property
    def asks_for_keys(self) -> bool:
        """Layers are chosen by what keys lose."""
        return isinstance(self.keep, str)

    def convert(
        self, model: PreTrainedModel, calibration: Calibration | None
    ) -> tuple[PreTrainedModel, Sequence[Check]]:
        """Fit features layer by layer, choose layers to keep, put the rules on a copy."""
        assert calibration is not None
        layers = self._layers(model)
        made = copy.deepcopy(model)
        own = [layer for layer in attention_layers(made) if layer.index in layers]
        fitted = {
            x.index: Fitting(f"layer {x.index}", self.window, self.features, self.steps)
            for x in own
        }
        put_rules(made, ((layer, fitted[layer.index]) for layer in own), setattr)
        body: Any = made.base_model
        body(input_ids=calibration.ids, use_cache=False)
        rules: dict[int, HedgehogAttention] = {}
        for layer in own:
            rule = fitted[layer.index].rule
            if rule is None:
                raise ModelError(
                    f"{self.name}: the attention of model type {model.config.model_type!r}, layer "
                    f"{layer.index}, does not go through transformers' attention interface."
                )
            rules[layer.index] = rule
            delattr(layer.module, ATTRIBUTE)

        @contextmanager
        def replaced(indices: Sequence[int]) -> Generator[PreTrainedModel]:
            there = [layer for layer in own if layer.index in indices]
            put_rules(made, [(layer, rules[layer.index]) for layer in there], setattr)
            yield made
            for layer in there:
                delattr(layer.module, ATTRIBUTE)

        asked = calibration.prompts
        lost = lost_without(layers, replaced, asked) if self.asks_for_keys else {}
        kept = chosen(self.keep, lost)
        method = dataclasses.replace(self, keep=kept)
        method._put(made, {i: rule for i, rule in rules.items() if i not in kept})
        put_record(made, method)
        return made, [*_checks(fitted, kept, lost)]

    def restore(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
        """Put the rules of a saved model back, from its tensors.

        Raises:
            ModelError: tensors that are missing or do not fit the model.
            MethodError: layers or a window that the model does not have.
        """
        layers = self._layers(model)
        if not isinstance(self.keep, tuple):
            raise MethodError(f"{self.name}: keep={self.keep!r} of a saved model: expected layers.")
        names = {id(module): name for name, module in model.named_modules()}
        config: Any = text_config(model)
        heads = int(config.num_attention_heads)
        rules: dict[int, HedgehogAttention] = {}
        left = set(tensors)
        for layer in attention_layers(model):
            if layer.index not in layers or layer.index in self.keep:
                continue
            prefix = f"{names[id(layer.module)]}.{ATTRIBUTE}"
            wanted = [f"{prefix}.{part}" for part in (_PARTS if self.window else _PARTS[:2])]
            missing = [name for name in wanted if name not in tensors]
            if missing:
                raise ModelError(f"{missing[0]} is missing from the checkpoint's weights.")
            left -= set(wanted)
            query, key = tensors[wanted[0]], tensors[wanted[1]]
            shapes = [[*tensors[name].shape] for name in wanted]
            fits = query.ndim == key.ndim == 3 and query.shape[1:] == key.shape[1:]
            if (
                not fits
                or len(query) != heads
                or heads % len(key)
                or shapes[2:] not in ([], [[heads]])
            ):
                raise ModelError(
                    f"{prefix} has tensors of shapes {shapes}, which do not fit {heads} heads."
                )
            rule = HedgehogAttention(heads, len(key), key.shape[2], self.window, 2 * key.shape[1])
            rule.load_state_dict({name.rpartition(".")[2]: tensors[name] for name in wanted})
            there = next(layer.module.parameters())
            rules[layer.index] = rule.to(there.device, there.dtype)
        if left:
            raise ModelError(f"{min(left)} is of a layer that is to be kept as it is.")
        self._put(model, rules)

    def _put(self, model: PreTrainedModel, rules: Mapping[int, HedgehogAttention]) -> None:
        own = [layer for layer in attention_layers(model) if layer.index in rules]
        put_rules(model, ((layer, rules[layer.index].eval()) for layer in own), setattr)
        decoder = decoder_of(model)
        caching = StateCaching.of(decoder, [layer.index for layer in own], self.window)
        if caching is not None:
            decoder.register_forward_pre_hook(caching, with_kwargs=True)

    def _layers(self, model: PreTrainedModel) -> list[int]:
        """Layers of full attention, those to be kept among them.

        Raises:
            ModelError: attention that cannot be reached or that features do not stand in for.
            MethodError: a window or layers that the model does not have.
        """
        refuse_features(
            model,
            *("attn_logit_softcapping", "attention_dropout", "attention_chunk_size"),
            who=self.name,
            instead="expected softmax attention (Llama, Mistral, Qwen2, Qwen3, Gemma-3, …)",
        )
        length = window(model)
        if length is not None and self.window > length:
            raise MethodError(
                f"{self.name}: window={self.window} and the model's {length:,}: expected at most "
                "that many tokens."
            )
        found = attention_layers(model)
        full = [layer.index for layer in found if layer.full]
        if not full:
            raise ModelError(
                f"{self.name} replaces layers of full attention, and all layers of model type "
                f"{model.config.model_type!r} slide over {found[0].window} tokens."
            )
        refuse_keep(self.name, self.keep, full)
        return full


def _checks(
    fitted: Mapping[int, Fitting], kept: Sequence[int], lost: Mapping[int, float]
) -> Sequence[Check]:
    worst = max(fitting.forms for fitting in fitted.values())
    detail = f"quadratic, recurrent and chunked to {worst:.0e} in float64"
    which = ", ".join(map(str, kept)) or "none"
    checks = [
        Check("forms agree", worst <= _FORMS, detail),
        Check("layers as they are", True, f"{len(kept)} of {len(fitted)}: {which}"),
    ]
    for index, fitting in fitted.items():
        before, after = fitting.off
        asked = f"; {loss_of_keys(lost[index])} without it" if lost else ""
        said = (
            "kept"
            if index in kept
            else f"misses {after:.0%} of the outputs ({before:.0%} unfitted)"
        )
        checks.append(Check(f"layer {index}", True, said + asked))
    return checks


METHOD = LinearAttention
