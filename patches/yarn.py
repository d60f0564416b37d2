"""YaRN: NTK-by-parts and a temperature on the attention logits.

    θ' as in ntk_by_parts;  cos and sin × (0.1 ln s + 1)

The usual first choice: little or no loss without fine-tuning up to s = 2 to 4, and few tokens of it
beyond. The temperature acts at every length, also inside the old window.

Source: Peng et al. 2023, YaRN (arXiv:2309.00071), eq. 21 to 23.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from longctx.rope import Frequencies, Rope

from ._scale import check_number
from .ntk_by_parts import NtkByParts

__all__ = ["METHOD", "Yarn"]


@dataclass(frozen=True, slots=True)
class Yarn(NtkByParts):
    """NTK-by-parts with YaRN's attention scaling."""

    attention_factor: float | None = None
    """Factor on cos and sin; None for the paper's 0.1 ln s + 1, or for what the `mscale` entries
    of a checkpoint with yarn of its own say."""

    name: ClassVar[str] = "yarn"

    def __post_init__(self) -> None:
        super(Yarn, self).__post_init__()
        if self.attention_factor is not None:
            check_number(self.name, "attention_factor", self.attention_factor)

    def attention_scaling(self, rope: Rope) -> float:
        """√(1/t) of the paper."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        log, extra = math.log(self.scale(rope)), rope.yarn
        if extra.get("mscale") and extra.get("mscale_all_dim"):  # DeepSeek scales attention itself
            return (0.1 * extra["mscale"] * log + 1.0) / (0.1 * extra["mscale_all_dim"] * log + 1.0)
        return 0.1 * log + 1.0

    def frequencies(self, rope: Rope) -> Frequencies:
        """NTK-by-parts' with the attention scaling."""
        by_parts = super(Yarn, self).frequencies(rope)
        return Frequencies(by_parts.inv_freq, self.attention_scaling(rope))

    def native_rope(self, rope: Rope) -> dict[str, Any]:
        """`rope_type: yarn`; the default temperature is left to the reader, which vLLM requires."""
        parameters = self._yarn(rope, self.attention_scaling(rope))
        if self.attention_factor is None:
            for key in ("attention_factor", "mscale", "mscale_all_dim"):
                parameters.pop(key, None)
        if rope.yarn.get("mscale_all_dim"):  # which scales attention itself (DeepSeek)
            return {**parameters, **rope.yarn}
        return parameters


METHOD = Yarn
