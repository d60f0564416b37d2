"""Queries scaled by the logarithm of their position, so that more keys do not blur attention.

    log_n       q · max(1, ln(m + 1) / ln L)              nothing changes inside the window
    ssmax       q · s · ln(m + 1)                         s is learnt per head in the paper
    llama4      q · (1 + β · ln(1 + ⌊(m + 1) / floor⌋))    β = 0.1 and floor = 8192 in Llama-4
    ministral   q · (1 + β · ln(1 + ⌊m / floor⌋))          the same with m from 0

with m the position of the query and L the window in tokens. It stacks with methods that change
frequencies or distances. ssmax changes every token and needs training.

Source: Su 2021, https://kexue.fm/archives/8823; Qwen's `use_logn_attn`; Nakanishi 2025, Scalable
Softmax (arXiv:2501.19399), equation 3; transformers' modeling_llama4
and modeling_ministral3 for the last two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from longctx.attention.hook import SCALE, QueryScale
from longctx.attention.layers import AttentionLayer, attention_layers, put_rules
from longctx.attention.query_scale import LogNScale, SsmaxScale, TemperatureScale
from longctx.errors import MethodError
from longctx.patch import Check, Method, Patch
from longctx.rope import Rope

from ._attention import attention_check, refuse_scaled, refuse_soft_caps
from ._scale import check_number, check_tokens

__all__ = ["METHOD", "LogN"]


@dataclass(frozen=True, slots=True)
class LogN(Method):
    """A factor on the queries of every layer of full attention."""

    kind: Literal["log_n", "ssmax", "llama4", "ministral"] = "log_n"
    """Which formula."""
    s: float = 0.43
    """Factor of ssmax."""
    beta: float = 0.1
    """Factor β of llama4 and ministral."""
    floor: int | None = None
    """Tokens within which these two change nothing; the window by default."""

    name: ClassVar[str] = "log_n"
    slots: ClassVar[tuple[str, ...]] = ("scale",)

    def __post_init__(self) -> None:
        if self.kind not in ("log_n", "ssmax", "llama4", "ministral"):
            raise MethodError(
                f"{self.name}: kind={self.kind!r}: expected log_n, ssmax, llama4 or ministral."
            )
        check_number(self.name, "s", self.s)
        check_number(self.name, "beta", self.beta)
        if self.floor is not None:
            check_tokens(self.name, "floor", self.floor)

    @classmethod
    def example(cls, rope: Rope) -> Method:
        """One that changes a short input enough to be seen."""
        return cls(kind="llama4", beta=1.0, floor=max(1, rope.length // 2))

    def scale(self, length: int) -> QueryScale:
        """The factor for a window of `length` tokens."""
        if self.kind == "ssmax":
            return SsmaxScale(self.s)
        if self.kind == "log_n":
            return LogNScale(length)
        floor = length if self.floor is None else self.floor
        return TemperatureScale(self.beta, floor, 1 if self.kind == "llama4" else 0)

    def apply(self, model: PreTrainedModel, patch: Patch) -> None:
        """Put the factor on the layers.

        Raises:
            ModelError: attention that cannot be reached or is soft-capped.
            MethodError: queries that are scaled already.
        """
        refuse_soft_caps(model, self.name)
        scale = self.scale(patch.window_below)
        for layer in _layers(model):
            refuse_scaled(layer.module, self.name)
            patch.set(layer.module, SCALE, scale)
        put_rules(model, [], patch.set)

    def verify(self, model: PreTrainedModel, patch: Patch) -> list[Check]:
        """Look for the factor in every layer, and for the attention in use."""
        scale, layers = self.scale(patch.window_below), _layers(model)
        there = sum(getattr(layer.module, SCALE, None) == scale for layer in layers)
        return [
            Check("factor in place", there == len(layers) > 0, f"{there} layers: {scale}"),
            attention_check(model),
        ]


def _layers(model: PreTrainedModel) -> list[AttentionLayer]:
    return [layer for layer in attention_layers(model) if layer.full]


METHOD = LogN
