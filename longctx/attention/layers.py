"""The attention of a model's layers: what each sees, what is refused, and putting a rule on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..model import attention_modules, text_config
from .hook import ATTRIBUTE, NAME, AttentionRule, register

__all__ = ["AttentionLayer", "attention_in_use", "attention_layers", "put_rules", "refuse_features"]

_FULL = "full_attention"
_FEATURES = {
    "attn_logit_softcapping": "soft-capped attention logits",
    "attention_dropout": "attention dropout",
    "attention_chunk_size": "chunked attention",
}


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One decoder layer's attention."""

    index: int
    """Of the layer, from 0."""
    module: nn.Module
    """The attention module, which holds the rule."""
    kind: str | None
    """Its layer type as the config writes it; None where the config has no layer types."""
    window: int | None
    """Keys that a token sees, itself included, by the model's own mask; None for all before it."""

    @property
    def full(self) -> bool:
        """Whether a token sees all tokens before it."""
        return self.kind in (None, _FULL) and self.window is None


def attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """The attention of every decoder layer.

    Raises:
        ModelError: a layer's attention does not go through transformers' attention interface.
    """
    window: int | None = getattr(text_config(model), "sliding_window", None)
    return [
        AttentionLayer(index, module, kind, None if kind == _FULL else window)
        for index, module, kind in attention_modules(model)
    ]


def attention_in_use(model: PreTrainedModel) -> str | None:
    """The name in transformers of the attention that the model runs; `hook.NAME` is the house's."""
    return getattr(text_config(model), "_attn_implementation", None)


def refuse_features(
    model: PreTrainedModel, *features: str, who: str, instead: str, also: Sequence[str] = ()
) -> None:
    """Refuse a model whose config asks for something that a rule does not compute.

    Args:
        model: looked at in its text config.
        *features: config entries that must be absent, None or 0: "attn_logit_softcapping",
            "attention_dropout", "attention_chunk_size".
        who: what refuses, as the subject of a sentence.
        instead: the way out.
        also: other things that were found in the model and are refused beside them.

    Raises:
        ModelError: it names what was found.
    """
    config: Any = text_config(model)
    values = {name: getattr(config, name, None) for name in features}
    found = [*also, *(f"{_FEATURES[n]} ({n}={value})" for n, value in values.items() if value)]
    if not found:
        return
    if values.get("attention_dropout"):
        instead += ", or set model.config.attention_dropout = 0 before the model is built"
    raise ModelError(
        f"model type {config.model_type!r} has {' and '.join(found)}, which {who} does not "
        f"compute: {instead}."
    )


def put_rules(
    model: PreTrainedModel,
    rules: Iterable[tuple[AttentionLayer, AttentionRule]],
    put: Callable[[Any, str, Any], None],
) -> None:
    """Put rules on attention modules and let the model run the attention that obeys them.

    Args:
        model: it keeps transformers' own attention in the layers without a rule.
        rules: which layer gets which.
        put: sets an attribute and remembers what was there, as `Patch.set` does.
    """
    register()
    for layer, rule in rules:
        put(layer.module, ATTRIBUTE, rule)
    put(text_config(model), "_attn_implementation_internal", NAME)
