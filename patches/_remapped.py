"""What the methods share that see keys at other distances than where they stand."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from longctx.attention.hook import ATTRIBUTE, SCALE
from longctx.attention.layers import put_rules
from longctx.attention.probing import framings_on, probe_turning
from longctx.attention.query_scale import LogNScale
from longctx.attention.remapped import Planner, RegionRule
from longctx.attention.turning import Framing, Rotation
from longctx.errors import MethodError
from longctx.model import rotary_of, text_config
from longctx.patch import Check, Patch
from longctx.rope import STANDSTILL, frequencies_of

from ._attention import AttentionMethod, attention_check, refuse_scaled, refuse_soft_caps
from ._scale import check_extent, check_flag, extended_length

__all__ = ["RemappedMethod"]


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
        refuse_soft_caps(model, self.name)
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
        return extended_length(self.name, self.factor, self.target, length)

    def verify(self, model: PreTrainedModel, patch: Patch) -> list[Check]:
        """Look for the rule, and try whether queries turn as the rule takes for granted."""
        layers = self.layers(model, patch.rope)
        rotation = Rotation(model, patch.rope.layer_type, layers[0].module)
        found = probe_turning(model, layers, rotation)
        wanted = self.rule(model, layers[0], patch)
        ruled = [*found.turning, *(found.still if wanted.planner.hides else ())]
        there = sum(getattr(x.module, ATTRIBUTE, None) == wanted for x in ruled)
        length, tokens = patch.window_below, self._window(patch.window_below)
        furthest = wanted.planner.furthest(tokens)
        distances = f"up to {furthest:,.0f} at {tokens:,} tokens; the window below holds {length:,}"
        checks = [
            Check(
                "rule in place",
                there == len(ruled),
                f"{there} of {len(ruled)}: {wanted.planner}",
            ),
            attention_check(model),
            Check(
                "queries turn",
                bool(found.turning),
                f"twice by half is once, to {found.difference:.0e} of a query, in "
                f"{len(found.turning)} layers; {len(found.still)} have no rotary",
            ),
            Check("distances trained", furthest <= length, distances),
        ]
        if wanted.planner.framed:
            framed = sum(bool(framings_on(x.module)) for x in found.turning)
            checks.append(Check("keys framed", framed == len(found.turning), f"{framed} layers"))
        return checks
