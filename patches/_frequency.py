"""What the frequency methods share: installing a rotary, saying it in a config, proving it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from longctx.errors import MethodError, ModelError
from longctx.model import (
    build_rotary,
    put_rope_parameters,
    put_rotary,
    refusal,
    rotary_of,
    text_config,
    with_rope_entry,
)
from longctx.patch import Check, Method, Patch
from longctx.rope import (
    STANDSTILL,
    Frequencies,
    Rope,
    ScaledRotary,
    as_longrope,
    frequencies_of,
    phase_error,
    phase_tolerance,
)

from ._scale import check_extent, extended_length, scale

__all__ = ["FrequencyMethod", "install_rope"]


def install_rope(
    model: PreTrainedModel, patch: Patch, parameters: dict[str, Any], length: int
) -> ScaledRotary:
    """Write `rope_parameters` into the config and put the rotary they describe in place."""
    config = text_config(model)
    refused = refusal(config, parameters, length)
    if refused:
        raise ModelError(
            f"{type(config).__name__} refuses rope_type {parameters['rope_type']!r}: {refused}"
        )
    patch.set(config, "max_position_embeddings", length)  # which parameters are checked against
    put_rope_parameters(config, with_rope_entry(config, parameters), patch.set)
    rotary = ScaledRotary(build_rotary(model, patch.rope.layer_type), patch.rope.layer_type)
    hook: Any = getattr(rotary_of(model), "_hf_hook", None)
    if hook is not None:  # a model spread by `device_map`: the new module joins it
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(rotary, hook)
    put_rotary(model, rotary, patch.set)
    return rotary


@dataclass(frozen=True, slots=True)
class FrequencyMethod(Method, ABC):
    """A static change of the inverse frequencies: one vector for every position and length.

    A frequency may be 0: its plane then does not turn, and says nothing of positions.
    """

    factor: float | None = None
    """How many times longer the window becomes, s ≥ 1. Give this or `target`."""
    target: int | None = None
    """The new window in tokens, at least the original one. Give this or `factor`."""

    name: ClassVar[str]
    slots: ClassVar[tuple[str, ...]] = ("rotary",)
    plain_loadable: ClassVar[bool] = True
    needs_extent: ClassVar[bool] = True
    """Whether the formula needs `factor` or `target`; else they only name the new window."""

    def __post_init__(self) -> None:
        check_extent(self.name, self.factor, self.target)

    @classmethod
    def example(cls, rope: Rope) -> Method:
        """Four-fold, or the defaults where the formula has no factor."""
        return cls(factor=4.0) if cls.needs_extent else cls()

    def scale(self, rope: Rope) -> float:
        """The factor s = target / L; 1 where none is given and the formula needs none."""
        if self.factor is None and self.target is None and not self.needs_extent:
            return 1.0
        return scale(self.name, self.factor, self.target, rope)

    @abstractmethod
    def frequencies(self, rope: Rope) -> Frequencies:
        """The method's formula in float64."""

    def native_rope(self, rope: Rope) -> dict[str, Any]:
        """The same in complete `rope_parameters`; a formula without a name there is longrope."""
        return as_longrope(rope, self.frequencies(rope), self.scale(rope))

    def neutral(self, rope: Rope) -> Method | None:
        """Factor 1."""
        return type(self)(factor=1.0)

    def apply(self, model: PreTrainedModel, patch: Patch) -> None:
        """Install the rotary that a plain reload of the saved config would build."""
        rope = patch.rope
        self._check_count(rope)
        parameters = self.native_rope(rope)
        length = extended_length(self.name, self.factor, self.target, rope.length)
        if refusal(text_config(model), parameters, length):
            parameters = as_longrope(rope, self.frequencies(rope), self.scale(rope))
        install_rope(model, patch, parameters, length)

    def _check_count(self, rope: Rope) -> None:
        """Refuse a formula that gives another number of frequencies than there are planes."""
        found, wanted = self.frequencies(rope).inv_freq.shape, rope.inv_freq().shape
        if found != wanted:
            raise MethodError(
                f"{self.name} gives frequencies of shape {[*found]}, the model's rotary has "
                f"{[*wanted]}: expected one for each plane."
            )

    def verify(self, model: PreTrainedModel, patch: Patch) -> list[Check]:
        """Compare what is installed with the formula, in value, precision and use."""
        rope, wanted = patch.rope, self.frequencies(patch.rope)
        rotary = rotary_of(model)
        return [
            *frequency_checks(rotary, rope, wanted),
            position_check(rotary, rope, wanted, int(text_config(model).max_position_embeddings)),
        ]


def frequency_checks(rotary: torch.nn.Module, rope: Rope, wanted: Frequencies) -> list[Check]:
    """Are the installed frequencies the formula's, in float32, and other than the model's own?"""
    inv_freq, scaling = frequencies_of(rotary, rope.layer_type)
    installed = inv_freq.double().cpu().clamp(min=STANDSTILL)
    error = (installed / wanted.inv_freq.clamp(min=STANDSTILL) - 1).abs().max().item()
    return [
        Check("rotary in place", isinstance(rotary, ScaledRotary), type(rotary).__name__),
        Check(
            "inverse frequencies",
            error < 1e-5,
            f"{_change(rope, wanted)}, within {error:.1e} of the formula in float64",
        ),
        Check("precision", inv_freq.dtype == torch.float32, f"inv_freq is {inv_freq.dtype}"),
        Check(
            "attention scaling",
            abs(scaling - wanted.attention_scaling) < 1e-6,
            f"cos and sin × {scaling:.6g}",
        ),
    ]


def _change(rope: Rope, wanted: Frequencies) -> str:
    """How much longer the wavelengths become, in words."""
    change = rope.inv_freq() / wanted.inv_freq
    turning = change[change.isfinite()].tolist()
    said = [f"wavelengths ×{min(turning):.4g} to ×{max(turning):.4g}"] if turning else []
    still = len(change) - len(turning)
    if still:
        said.append("1 plane does not turn" if still == 1 else f"{still} planes do not turn")
    return ", ".join(said)


def position_check(rotary: torch.nn.Module, rope: Rope, wanted: Frequencies, length: int) -> Check:
    """Does the last position of the new window turn by the angle that the formula gives?"""
    position = max(length - 1, rope.length)
    error = phase_error(rotary, rope, wanted, position)
    return Check(
        "rotation in use",
        error < phase_tolerance(position),
        f"cos/sin at position {position} within {error:.1e} of float64",
    )
