"""Dynamic NTK: the base follows the length of the request.

    b' = b · (f·T/L − (f − 1))^(d/(d−2)),  T = prompt + new tokens, at least L

Inside the original window nothing changes. T is settled before the first token of a request is
read and kept to its end, so that every cached key was turned by the base its queries use;
`generate` does this by itself. transformers' own `dynamic` lets the base grow while older keys
keep the former one, and never scales once `max_position_embeddings` is raised; it agrees with
this where a whole input is read in one pass.

Source: emozilla 2023 ("Dynamically scaled RoPE"); YaRN (arXiv:2309.00071), appendix B.1.
"""

from __future__ import annotations

import types
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longctx.errors import MethodError
from longctx.model import decoder_of, rotary_of, text_config
from longctx.patch import Check, Method, Patch
from longctx.rope import Frequencies, Rope, ScaledRotary, frequencies_of

from ._frequency import frequency_checks, install_rope, position_check
from ._scale import check_extent, scale

__all__ = ["METHOD", "Dynamic", "reserve"]


class RequestRotary(ScaledRotary):
    """A rotary whose base is fixed for one request: from a position 0 to the next one."""

    def __init__(self, native: nn.Module, layer_type: str | None, window: int) -> None:
        super().__init__(native, layer_type)
        self.window = window
        self.reserved = window
        self.length = 0

    def forward(
        self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [batch, seq, d], at the request's base."""
        if self.layer_type is None or self.layer_type in (*args, *kwargs.values()):
            self._follow(int(position_ids.min()), int(position_ids.max()) + 1)
        return super().forward(x, position_ids, *args, **kwargs)

    def _follow(self, first: int, end: int) -> None:
        if first == 0:
            self.settle(max(end, self.reserved))
        elif end > self.length:
            raise MethodError(
                f"dynamic: this request was begun for {self.length} tokens and its cached keys are "
                f"turned for that length; position {end - 1} lies beyond. Use model.generate, or "
                "`with longctx.patches.dynamic.reserve(model, tokens):` around the whole request."
            )

    def settle(self, length: int) -> None:
        """Compute the frequencies for T = `length` tokens, as transformers does for one pass."""
        if length == self.length:
            return
        config: Any = self.native.config
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        current, _ = frequencies_of(self, self.layer_type)
        tokens = torch.tensor(length, device=current.device)
        inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](
            config, current.device, seq_len=tokens, layer_type=self.layer_type
        )
        self.native.register_buffer(f"{prefix}inv_freq", inv_freq, persistent=False)
        self.length = length


@contextmanager
def reserve(model: PreTrainedModel, tokens: int) -> Generator[None]:
    """Begin requests inside the block for at least `tokens` tokens (prompt and answer together).

    Raises:
        MethodError: the model is not under `dynamic`.
    """
    rotary = _rotary(model)
    before = rotary.reserved
    rotary.reserved = max(tokens, rotary.window)
    try:
        yield
    finally:
        rotary.reserved = before


def _rotary(model: PreTrainedModel) -> RequestRotary:
    rotary = rotary_of(model)
    if not isinstance(rotary, RequestRotary):
        raise MethodError("the model is not extended by dynamic: nothing to reserve.")
    return rotary


def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`generate` with T settled first; bound to the model instance in place of its own."""
    config = kwargs.get("generation_config") or model.generation_config
    named = (kwargs.get(key) for key in ("inputs", "input_ids", "inputs_embeds"))
    prompt = next((x for x in (*args[:1], *named) if isinstance(x, Tensor)), None)
    read = 1 if prompt is None else prompt.shape[1]
    new = kwargs.get("max_new_tokens", getattr(config, "max_new_tokens", None))
    end = kwargs.get("max_length", getattr(config, "max_length", None)) or read + 20
    with reserve(model, read + new if new is not None else max(end, read)):
        plain: Any = type(model)
        return plain.generate(model, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class Dynamic(Method):
    """NTK scaling by the length of the request.

    It has no neutral setting, but inside the original window it is the identity at any factor.
    """

    factor: float | None = None
    """f of the formula: 1 gives exactly NTK for T/L; larger values scale harder."""
    target: int | None = None
    """Tokens; f = target / L."""

    name: ClassVar[str] = "dynamic"
    slots: ClassVar[tuple[str, ...]] = ("rotary", "positions")
    plain_loadable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_extent(self.name, self.factor, self.target)

    @classmethod
    def example(cls, rope: Rope) -> Method:
        """Four-fold."""
        return cls(factor=4.0)

    @property
    def length_invariant(self) -> bool:
        """False: the same token is turned by another base in a longer input."""
        return False

    def frequencies(self, rope: Rope, length: int) -> Frequencies:
        """The formula in float64 for a request of `length` tokens."""
        f = scale(self.name, self.factor, self.target, rope)
        stretch = f * max(length, rope.length) / rope.length - (f - 1)
        return Frequencies(rope.inv_freq(rope.theta * stretch ** (rope.dim / (rope.dim - 2))))

    def native_rope(self, rope: Rope) -> dict[str, Any]:
        """`rope_type: dynamic`, which reads L from `max_position_embeddings`: it must not grow."""
        f = scale(self.name, self.factor, self.target, rope)
        return rope.parameters("dynamic", factor=f)

    def apply(self, model: PreTrainedModel, patch: Patch) -> None:
        """Install the per-request rotary and a `generate` that settles the length first."""
        static = install_rope(model, patch, self.native_rope(patch.rope), patch.rope.length)
        rotary = RequestRotary(static.native, patch.rope.layer_type, patch.rope.length)
        patch.set(decoder_of(model), "rotary_emb", rotary)
        rotary.settle(patch.rope.length)
        if hasattr(model, "generate"):
            patch.set(model, "generate", types.MethodType(_generate, model))

    def reserve(self, model: PreTrainedModel, tokens: int) -> AbstractContextManager[None]:
        """Settle the base for that many tokens; see the function of this name."""
        return reserve(model, tokens)

    def verify(self, model: PreTrainedModel, patch: Patch) -> list[Check]:
        """Settle for twice the window, compare with the formula, and settle back."""
        rope, rotary = patch.rope, _rotary(model)
        before, reserved = rotary.length, rotary.reserved
        probe = 2 * rope.length
        wanted = self.frequencies(rope, probe)
        rotary.reserved = rope.length
        rotary.settle(probe)
        try:
            checks = frequency_checks(rotary, rope, wanted)
            checks.append(position_check(rotary, rope, wanted, probe))
        finally:
            rotary.settle(before)
            rotary.reserved = reserved
        held = int(text_config(model).max_position_embeddings)
        checks.append(
            Check("window kept", held == rope.length, f"max_position_embeddings is {held} = L")
        )
        return checks


METHOD = Dynamic
