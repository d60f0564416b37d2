"""Turning queries and keys further by the model's own rotary, and caching keys in another frame.

RoPE turns compose: a vector that was turned by f(p) and is turned by p − f(p) more stands where p
would have put it. So a method may cache keys turned by a frame f(p) of its own and turn queries so
that their distance comes out as it wants. Phases are computed in float64 (a float32 phase is off
by 0.06 radians at a million tokens), once for all layers of a pass.

Legend: B batch, S tokens, D rotated channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..model import decoder_of, rotary_of
from ..rope import frequencies_of, planes_of
from .once import Once

__all__ = ["Frame", "Framing", "Rotation"]

Frame: TypeAlias = Callable[[Tensor], Tensor]
"""From the positions of tokens to those that their keys are cached at, float64 both."""


class Rotation:
    """The rotary of one model and layer type, for turning what it has turned already.

    Args:
        model: it must keep its rotary at model level.
        layer_type: the entry of a rotary that has one for each layer type, else None.
        attention: an attention module, whose source file holds the function that turns.

    Raises:
        ModelError: no such function, or a rotary that gives no cos and sin.
    """

    def __init__(
        self, model: PreTrainedModel, layer_type: str | None, attention: nn.Module
    ) -> None:
        self.decoder = decoder_of(model)
        self.layer_type = layer_type
        source: Any = inspect.getmodule(type(attention))
        self._apply: Any = getattr(source, "apply_rotary_pos_emb", None)
        if self._apply is None:
            raise ModelError(
                f"model type {model.config.model_type!r} has no apply_rotary_pos_emb beside "
                f"{type(attention).__name__}: methods that change distances cannot turn its "
                "queries. Methods that change frequencies may work."
            )
        self.planes = planes_of(rotary_of(model), layer_type)
        """Which plane each channel of cos and sin belongs to, int [D]."""

    @property
    def scaling(self) -> float:
        """The factor on cos and sin that the rotary applies."""
        return frequencies_of(self.decoder.get_submodule("rotary_emb"), self.layer_type)[1]

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of a turn by so many positions, float32 [..., D], unscaled."""
        inv_freq, _ = frequencies_of(self.decoder.get_submodule("rotary_emb"), self.layer_type)
        phase = positions.double()[..., None] * inv_freq.double()
        planes = self.planes.to(phase.device)
        return phase.cos().float()[..., planes], phase.sin().float()[..., planes]

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn x [B, heads, S, head_dim] by cos and sin [S, D]; channels beyond D stay."""
        width = cos.shape[-1]
        turning, rest = x[..., :width], x[..., width:]
        nothing = turning[:, :0]
        precise = torch.promote_types(x.dtype, torch.float32)
        turned, _ = self._apply(turning.to(precise), nothing.to(precise), cos[None], sin[None])
        turned = turned.to(x.dtype)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


class Framing:
    """A forward pre-hook of attention modules: cos and sin of the frame for those of positions.

    Args:
        rotation: of the layers it is put on.
        frame: where keys and queries are turned to.
    """

    def __init__(self, rotation: Rotation, frame: Frame) -> None:
        self.rotation = rotation
        self.frame = frame
        self._once: Once[tuple[Tensor, Tensor]] = Once()
        self._off = False

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Turn by the positions themselves, inside the block."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace `position_embeddings` by that of the frame of `position_ids`."""
        if self._off:
            return None
        native: Any = kwargs.get("position_embeddings")
        positions: Any = kwargs.get("position_ids")
        if not isinstance(native, tuple) or not isinstance(positions, Tensor):
            raise ModelError(
                f"{type(module).__name__} is not handed position_embeddings (cos, sin) and "
                "position_ids by name: methods that change distances cannot reach its keys. "
                "Methods that change frequencies may work."
            )
        if positions.ndim != 2:
            raise ModelError(
                f"position_ids of shape {[*positions.shape]}: expected [batch, seq]; positions in "
                "several dimensions (images, video) have no distances to change."
            )
        dtype = native[0].dtype
        embeddings = self._once.get(lambda: self._embeddings(positions, dtype), positions, dtype)
        return args, {**kwargs, "position_embeddings": embeddings}

    def _embeddings(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotation.cos_sin(self.frame(positions.double()))
        scaling = self.rotation.scaling
        return (cos * scaling).to(dtype), (sin * scaling).to(dtype)
