"""Rotary position embedding: its geometry, and how a model instance is given another one.

Legend: i = index of a rotated plane, d = rotary dim (two channels a plane), b = rope_theta,
L = original window in tokens; inv_freq θᵢ = b^(−2i/d) in radians per token (Su et al. 2021,
eq. 15).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError

__all__ = [
    "STANDSTILL",
    "YARN_EXTRAS",
    "Frequencies",
    "Rope",
    "ScaledRotary",
    "as_longrope",
    "carried_entries",
    "frequencies_of",
    "planes_of",
]

YARN_EXTRAS = ("mscale", "mscale_all_dim", "truncate")
"""Entries of yarn that DeepSeek (attention scaling) and GPT-OSS (whole planes or not) add to it."""
_OF_SCALING = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"),
    *("partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow"),
    *("short_factor", "long_factor", "short_mscale", "long_mscale"),
    *("low_freq_factor", "high_freq_factor", "apply_yarn_scaling", *YARN_EXTRAS),
}
"""Entries that say how frequencies are scaled, which a method replaces."""

STANDSTILL = 2.0**-100
"""A frequency that turns nothing, in radians per token: at token 2⁴⁰ cos is 1 and sin 9e-19, far
below float32 resolution. The divisor θ/θ' ≤ 2¹⁰⁰ fits float32 and bfloat16."""

_TELLING = 1e-3  # radians per token; plane i gets i + 1 times as much


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotary geometry that a model was trained with."""

    dim: int
    """Rotated channels of a head: twice the number of planes."""
    theta: float
    """Base b of the inverse frequencies (`rope_theta`)."""
    length: int
    """Original window L in tokens."""
    partial_rotary_factor: float | None = None
    """Share of the head that is rotated, None where the config does not mention it (all)."""
    layer_type: str | None = None
    """The entry of nested `rope_parameters` ("full_attention"), None where they are flat."""
    carried: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Entries of `rope_parameters` that other parts of the model read (`mrope_section`,
    `llama_4_scaling_beta`): every method keeps them."""
    yarn: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the checkpoint's own yarn says beside factor and betas (`YARN_EXTRAS`)."""

    def inv_freq(self, theta: float | None = None) -> Tensor:
        """θᵢ = b^(−2i/d), float64, shape [d/2], radians per token; `theta` replaces b."""
        planes = torch.arange(0, self.dim, 2, dtype=torch.float64)
        return (self.theta if theta is None else theta) ** (-planes / self.dim)

    def parameters(self, rope_type: str, **entries: Any) -> dict[str, Any]:
        """Complete `rope_parameters`: what is left out here, transformers would guess."""
        complete: dict[str, Any] = {"rope_type": rope_type, "rope_theta": self.theta, **entries}
        if self.partial_rotary_factor is not None:
            complete["partial_rotary_factor"] = self.partial_rotary_factor
        if self.carried:  # whoever reads them counts from the original window too (Ministral-3)
            complete.setdefault("original_max_position_embeddings", self.length)
        return {**complete, **self.carried}


def carried_entries(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `rope_parameters` that say something else than a scaling of frequencies."""
    return {key: value for key, value in entry.items() if key not in _OF_SCALING}


@dataclass(frozen=True, slots=True)
class Frequencies:
    """What a rotary method comes down to."""

    inv_freq: Tensor
    """float64 [d/2], radians per token."""
    attention_scaling: float = 1.0
    """Factor on cos and sin alike, so its square is on the logits."""


def as_longrope(rope: Rope, frequencies: Frequencies, factor: float) -> dict[str, Any]:
    """Say any static frequency vector in `rope_parameters`: longrope with short = long = θ/θ'.

    A plane with θ' = 0 is written as one of `STANDSTILL`, since no finite divisor gives 0.
    `short_mscale` and `long_mscale` repeat `attention_factor` for vLLM, which reads those.
    """
    divisors = (rope.inv_freq() / frequencies.inv_freq.clamp(min=STANDSTILL)).tolist()
    scaling = frequencies.attention_scaling
    return rope.parameters(
        "longrope",
        factor=factor,
        original_max_position_embeddings=rope.length,
        short_factor=divisors,
        long_factor=divisors,
        attention_factor=scaling,
        short_mscale=scaling,
        long_mscale=scaling,
    )


class ScaledRotary(nn.Module):
    """A model's own rotary, built from its extended config, with float32 frequencies kept float32.

    The frequencies are those that transformers computes from the saved config, so a plain reload
    is bit-exact. Casting a model (`.half()`, `.to(torch.bfloat16)`) casts a rotary's buffers too,
    which is worth up to 5.8 radians of phase at 32k tokens: this module restores them.

    Args:
        native: a freshly built rotary of the model's own class.
        layer_type: the entry of a per-layer-type rotary that was extended, else None.
    """

    def __init__(self, native: nn.Module, layer_type: str | None) -> None:
        super().__init__()
        self.native = native
        self.layer_type = layer_type
        # The type decides only whether frequencies are recomputed in forward; these are settled.
        settled: Any = "default"
        if layer_type is not None:
            types: Any = native.rope_type
            settled = {**types, layer_type: "default"}
        native.rope_type = settled

    def forward(
        self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [batch, seq, d], in the dtype of `x`."""
        return self.native(x, position_ids, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What people read off a rotary (`inv_freq`, `attention_scaling`) is the native one's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "native":  # not built yet
                raise
            return getattr(self.native, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScaledRotary:
        before = dict(self.native.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.native.named_buffers():
            if buffer.dtype != before[name].dtype:
                self.native.register_buffer(name, before[name].to(buffer.device), persistent=False)
        return self


def frequencies_of(rotary: nn.Module, layer_type: str | None) -> tuple[Tensor, float]:
    """The installed inverse frequencies [d/2] (as stored, not converted) and attention scaling."""
    native = rotary.native if isinstance(rotary, ScaledRotary) else rotary
    prefix = "" if layer_type is None else f"{layer_type}_"
    inv_freq: Tensor = getattr(native, f"{prefix}inv_freq")
    scaling: float = getattr(native, f"{prefix}attention_scaling")
    return inv_freq, scaling


def planes_of(rotary: nn.Module, layer_type: str | None) -> Tensor:
    """Which plane each channel of cos and sin belongs to, int [d], read off a copy of the rotary.

    Most rotaries say cos of all planes twice; some say each plane twice in a row (Cohere), or once
    (GPT-OSS, and those that give complex numbers).

    Raises:
        ModelError: a rotary that gives neither cos and sin nor complex numbers.
    """
    twin = copy.deepcopy(rotary.native if isinstance(rotary, ScaledRotary) else rotary)
    prefix = "" if layer_type is None else f"{layer_type}_"
    inv_freq, _ = frequencies_of(twin, layer_type)
    number = torch.arange(1, inv_freq.numel() + 1, dtype=torch.float32, device=inv_freq.device)
    setattr(twin, f"{prefix}inv_freq", number * _TELLING)
    setattr(twin, f"{prefix}attention_scaling", 1.0)
    x = torch.zeros(1, 1, 1, dtype=torch.float32, device=inv_freq.device)
    where = torch.ones(1, 1, dtype=torch.long, device=inv_freq.device)
    cos, sin = _cos_sin(twin, x, where, layer_type)
    planes = (
        torch.atan2(sin[0, 0].double(), cos[0, 0].double()) / _TELLING
    ).round().long().cpu() - 1
    if not bool(((planes >= 0) & (planes < inv_freq.numel())).all()):
        raise ModelError(
            f"{type(twin).__name__} computes its frequencies anew at every call (from the length "
            "of the input, or its config): what a method installs would not be used."
        )
    return planes


def _cos_sin(
    rotary: nn.Module, x: Tensor, positions: Tensor, layer_type: str | None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine as a rotary gives them, whether as two tensors or as a complex one."""
    found: Any = rotary(x, positions, *([] if layer_type is None else [layer_type]))
    if isinstance(found, Tensor) and found.is_complex():
        return found.real, found.imag
    if not isinstance(found, tuple) or len(found) != 2:
        raise ModelError(
            f"{type(rotary).__name__} gives neither cos and sin nor complex numbers: its planes "
            "cannot be told apart. Methods that replace the rotary (alibi) may work."
        )
    return found


def phase_error(rotary: nn.Module, rope: Rope, wanted: Frequencies, position: int) -> float:
    """Largest difference of the rotary's cos/sin at one position from float64, in cos/sin units."""
    inv_freq, _ = frequencies_of(rotary, rope.layer_type)
    x = torch.zeros(1, 1, 1, device=inv_freq.device)
    where = torch.tensor([[position]], device=inv_freq.device)
    cos, sin = _cos_sin(rotary, x, where, rope.layer_type)
    phase = position * wanted.inv_freq[planes_of(rotary, rope.layer_type)]
    error_cos = cos[0, 0].double().cpu() - phase.cos() * wanted.attention_scaling
    error_sin = sin[0, 0].double().cpu() - phase.sin() * wanted.attention_scaling
    return max(error_cos.abs().max().item(), error_sin.abs().max().item())


def phase_tolerance(position: int) -> float:
    """What float32 may cost at a position: a few roundings of the phase, which is ≤ `position`."""
    return 1e-5 + 16 * max(position, 1) * math.ldexp(1.0, -24)
