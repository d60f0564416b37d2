"""What the methods share that see keys at other distances than where they stand."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from longctx.attention.hook import ATTRIBUTE, NAME, SCALE, QueryScale
from longctx.attention.layers import attention_in_use, put_rules, refuse_features
from longctx.attention.probing import framings_on, probe_turning
from longctx.attention.query_scale import LogNScale
from longctx.attention.regions import distances
from longctx.attention.remapped import Planner, RegionRule
from longctx.attention.turning import Framing, Rotation
from longctx.errors import MethodError
from longctx.model import rotary_of, text_config
from longctx.patch import Check, Patch
from longctx.rope import STANDSTILL, frequencies_of

from ._attention import AttentionMethod
from ._scale import LONGEST, check_extent

__all__ = ["RemappedMethod", "check_flag", "check_tokens", "refuse_scaled"]


def check_tokens(method: str, field: str, value: object, *, least: int = 1) -> None:
    """Refuse anything but a whole number of at least so many tokens."""
    if type(value) is not int or not least <= value <= LONGEST:
        raise MethodError(
            f"{method}: {field}={value!r}: expected a whole number ≥ {least}, such as "
            f"{field}={max(least, 100)}, and at most {LONGEST:,}."
        )


def check_flag(method: str, field: str, value: object) -> None:
    """Refuse anything but true and false."""
    if type(value) is not bool:
        raise MethodError(f"{method}: {field}={value!r}: expected True or False.")


@dataclass(frozen=True, slots=True)
class RemappedMethod(AttentionMethod):
    """Every key is seen at a distance that the model was trained with; no weight changes.

    Keys are cached turned to a frame of the method's own, and queries are turned further for each
    region of keys (`longctx.attention`).
    """

    factor: float | None = None
    """How many times longer the declared window becomes; the formula does without it."""
    target: int | None = None
    """The declared window in tokens; the formula does without it."""
    log_n: bool = False
    """Scale queries by max(1, ln(m + 1) / ln L) too, as the method `log_n` does."""

    slots: ClassVar[tuple[str, ...]] = ("attention", "positions")

    def __post_init__(self) -> None:
        check_extent(self.name, self.factor, self.target)
        check_flag(self.name, "log_n", self.log_n)

    @abstractmethod
    def planner(self, length: int) -> Planner:
        """The formula for a window of `length` tokens.

        Raises:
            MethodError: a setting that does not fit into the window.
        """

    def rule(self, model: PreTrainedModel, layer: object, patch: Patch) -> RegionRule:
        """The planner of the window below, the same in every layer."""
        del model, layer
        return RegionRule(self.planner(patch.window_below))

    def apply(self, model: PreTrainedModel, patch: Patch) -> None:
        """Turn keys to the frame and put the rule on every layer that turns.

        Raises:
            ModelError: attention that cannot be reached, or layers that turn in their own way.
            MethodError: settings that do not fit the window, or a factor on queries in place.
        """
        instead = "methods that change frequencies work"
        refuse_features(model, "attn_logit_softcapping", who=self.name, instead=instead)
        length = patch.window_below
        planner = self.planner(length)
        layers = self.layers(model, patch.rope)
        rotation = Rotation(model, patch.rope.layer_type, layers[0].module)
        found = probe_turning(model, layers, rotation)
        frequencies, _ = frequencies_of(rotary_of(model), patch.rope.layer_type)
        if not found.turning or not bool((frequencies > 2 * STANDSTILL).any()):
            why = "have no rotary" if not found.turning else "turn nothing, all frequencies being 0"
            raise MethodError(
                f"{self.name} changes layers that see all tokens and know positions; those of "
                f"model type {model.config.model_type!r} that see all {why}."
            )
        framing = Framing(rotation, planner.frame)
        rules = [(layer, RegionRule(planner)) for layer in found.still if planner.hides]
        rule = RegionRule(planner, rotation)
        for layer in found.turning:
            if planner.framed:
                patch.hook(layer.module, framing)
            if self.log_n:
                refuse_scaled(layer.module, self.name)
                patch.set(layer.module, SCALE, LogNScale(length))
        put_rules(model, [*rules, *((layer, rule) for layer in found.turning)], patch.set)
        patch.set(text_config(model), "max_position_embeddings", self._window(length))

    def _window(self, length: int) -> int:
        if self.target is not None:
            if self.target < length:
                raise MethodError(
                    f"{self.name}: target={self.target} tokens is below the window of {length}; "
                    "a window can only be extended."
                )
            return int(self.target)
        return int(length * (self.factor or 1) + 1e-9)

    def verify(self, model: PreTrainedModel, patch: Patch) -> list[Check]:
        """Look for the rule, and try whether queries turn as the rule takes for granted."""
        layers = self.layers(model, patch.rope)
        rotation = Rotation(model, patch.rope.layer_type, layers[0].module)
        found = probe_turning(model, layers, rotation)
        wanted = self.rule(model, layers[0], patch)
        ruled = [*found.turning, *(found.still if wanted.planner.hides else ())]
        there = sum(getattr(x.module, ATTRIBUTE, None) == wanted for x in ruled)
        used = attention_in_use(model)
        checks = [
            Check(
                "rule in place",
                there == len(ruled),
                f"{there} of {len(ruled)}: {wanted.planner}",
            ),
            Check("attention in use", used == NAME, f"attn_implementation is {used!r}"),
            Check(
                "queries turn",
                bool(found.turning),
                f"twice by half is once, to {found.difference:.0e} of a query, in "
                f"{len(found.turning)} layers; {len(found.still)} have no rotary",
            ),
        ]
        checks.append(_distance_check(wanted.planner, self._window(patch.window_below), patch))
        if wanted.planner.framed:
            framed = sum(bool(framings_on(x.module)) for x in found.turning)
            checks.append(Check("keys framed", framed == len(found.turning), f"{framed} layers"))
        return checks


def _distance_check(planner: Planner, window: int, patch: Patch) -> Check:
    """Is every distance one that the window below holds, seen from the declared window's end?"""
    last = torch.tensor([window - 1.0], dtype=torch.float64)
    keys = torch.arange(window, dtype=torch.float64)
    found = distances(planner.plan(window - 1, 1, window), planner.frame(last), planner.frame(keys))
    largest = float(found.nan_to_num(0.0).max())
    return Check(
        "distances trained",
        largest <= patch.window_below,
        f"up to {largest:,.0f} at {window:,} tokens; the window below holds {patch.window_below:,}",
    )


def refuse_scaled(module: nn.Module, who: str) -> None:
    """Refuse a second factor on the queries of an attention module."""
    scale: QueryScale | None = getattr(module, SCALE, None)
    if scale is not None:
        raise MethodError(
            f"{who}: queries are scaled already ({scale}): scale them once, or call "
            "longctx.patch_of(model).remove() first."
        )
