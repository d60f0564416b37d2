"""What the methods that change attention share: choosing layers, installing a rule, proving it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from longctx.attention.hook import ATTRIBUTE, NAME, SCALE, AttentionRule, QueryScale
from longctx.attention.layers import (
    AttentionLayer,
    attention_in_use,
    attention_layers,
    put_rules,
    refuse_features,
)
from longctx.errors import MethodError, ModelError
from longctx.model import text_config
from longctx.patch import Check, Method, Patch
from longctx.rope import Rope

__all__ = ["AttentionMethod", "attention_check", "refuse_scaled", "refuse_soft_caps"]


@dataclass(frozen=True, slots=True)
class AttentionMethod(Method, ABC):
    """A rule for the attention of some layers: who sees whom, and with which logits."""

    name: ClassVar[str]
    slots: ClassVar[tuple[str, ...]] = ("attention",)
    changes_far_logits: ClassVar[bool] = False  # what is hidden or moved may lie further back

    @abstractmethod
    def rule(self, model: PreTrainedModel, layer: AttentionLayer, patch: Patch) -> AttentionRule:
        """The formula for one layer; equal settings make equal rules.

        A rule that is an `nn.Module` follows the train or eval mode of the layer, and is compared
        by its type and `repr`.
        """

    def takes(self, layer: AttentionLayer, rope: Rope) -> bool:
        """Whether the layer gets the rule: by default where a token sees all before it."""
        del rope
        return layer.full

    def layers(self, model: PreTrainedModel, rope: Rope) -> list[AttentionLayer]:
        """The layers that get the rule.

        Raises:
            ModelError: attention that cannot be reached, or no such layer.
        """
        found = [layer for layer in attention_layers(model) if self.takes(layer, rope)]
        if not found:
            config = text_config(model)
            raise ModelError(
                f"{self.name} changes layers of full attention, and model type "
                f"{config.model_type!r} has none: its layers have a sliding window "
                f"({getattr(config, 'sliding_window', None)} tokens). Use it without {self.name}."
            )
        return found

    def apply(self, model: PreTrainedModel, patch: Patch) -> None:
        """Put the rule on the layers; the others keep the model's own attention.

        Raises:
            ModelError: attention that cannot be reached or that rules do not compute (soft-capped
                logits; where the method trains only, dropout), or no layer to put the rule on.
        """
        refuse_soft_caps(model, self.name, *(["attention_dropout"] if self.trains_only else []))
        rules = [
            (layer, self.rule(model, layer, patch)) for layer in self.layers(model, patch.rope)
        ]
        for layer, rule in rules:
            if isinstance(rule, nn.Module):
                rule.train(layer.module.training)
        put_rules(model, rules, patch.set)

    def verify(self, model: PreTrainedModel, patch: Patch) -> list[Check]:
        """Look for the rule in every layer, in its module's mode, and for the attention in use."""
        layers = self.layers(model, patch.rope)
        found = [getattr(layer.module, ATTRIBUTE, None) for layer in layers]
        wanted = [self.rule(model, layer, patch) for layer in layers]
        there = sum(_same(one, other) for one, other in zip(found, wanted, strict=True))
        checks = [
            Check("rule in place", there == len(layers), f"{there} of {len(layers)}: {wanted[0]}"),
            attention_check(model),
        ]
        return [*checks, _mode_check(layers, found)] if self.trains_only else checks


def refuse_soft_caps(model: PreTrainedModel, who: str, *also: str) -> None:
    """Refuse what longctx's attention does not compute, and further features of the config.

    Raises:
        ModelError: it names what was found.
    """
    instead = "methods that change frequencies work"
    refuse_features(model, "attn_logit_softcapping", *also, who=who, instead=instead)


def refuse_scaled(module: nn.Module, who: str) -> None:
    """Refuse a second factor on the queries of an attention module."""
    scale: QueryScale | None = getattr(module, SCALE, None)
    if scale is not None:
        raise MethodError(
            f"{who}: queries are scaled already ({scale}): scale them once, or call "
            "longctx.patch_of(model).remove() first."
        )


def attention_check(model: PreTrainedModel) -> Check:
    """Does the model run the attention that obeys rules?"""
    used = attention_in_use(model)
    return Check("attention in use", used == NAME, f"attn_implementation is {used!r}")


def _same(one: object, other: object) -> bool:
    modules = isinstance(one, nn.Module) and isinstance(other, nn.Module)
    same = repr(one) == repr(other) if modules else one == other
    return type(one) is type(other) and same


def _mode_check(layers: list[AttentionLayer], rules: Sequence[object]) -> Check:
    """Is each rule in the mode of its layer? Else `model.train()` does not reach it."""
    modes = [layer.module.training for layer in layers]
    return Check(
        "training only",
        [getattr(rule, "training", None) for rule in rules] == modes,
        "acting now" if all(modes) else "plain attention until model.train()",
    )
