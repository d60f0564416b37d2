"""Adjusted base frequency: a base that you choose.

    θ'ᵢ = b'^(−2i/d),  b' = 500,000 by default

What Code Llama and the long LLaMA-2 models were trained on with; needs fine-tuning. `factor` or
`target` only names the new window: the frequencies follow from `theta` alone.

Source: Xiong et al. 2023, "Effective Long-Context Scaling of Foundation Models"
(arXiv:2309.16039), section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from longctx.patch import Method
from longctx.rope import Frequencies, Rope

from ._frequency import FrequencyMethod
from ._scale import check_number

__all__ = ["METHOD", "Abf"]


@dataclass(frozen=True, slots=True)
class Abf(FrequencyMethod):
    """RoPE with another base."""

    theta: float = 500_000.0
    """The new `rope_theta`."""

    name: ClassVar[str] = "abf"

    def __post_init__(self) -> None:
        super(Abf, self).__post_init__()
        check_number(self.name, "theta", self.theta, minimum=1.0)

    def frequencies(self, rope: Rope) -> Frequencies:
        """theta^(−2i/d)."""
        return Frequencies(rope.inv_freq(self.theta))

    def native_rope(self, rope: Rope) -> dict[str, Any]:
        """Plain RoPE with another `rope_theta`."""
        return rope.parameters("default") | {"rope_theta": float(self.theta)}

    def neutral(self, rope: Rope) -> Method | None:
        """The model's own base."""
        return Abf(factor=1.0, theta=rope.theta)


METHOD = Abf
