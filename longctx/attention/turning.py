"""Turning queries and keys further by the model's own rotary, and caching keys in another frame.

RoPE turns compose: a vector that was turned by f(p) and is turned by p − f(p) more stands where p
would have put it. So a method may cache keys turned by a frame f(p) of its own and turn queries so
that their distance comes out as it wants. Phases are computed in float64 (a float32 phase is off
by 0.06 radians at a million tokens), once for all layers of a pass.

Models pair the channels that form a plane in one of two ways: channel i with i + D/2, or 2i with
2i + 1. Both are turned here in as few passes over memory as they take; whatever pairs them in
another way is turned by the model's own function.

Legend: B batch, S tokens, D rotated channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ..errors import ModelError
from ..model import decoder_of, rotary_of
from ..rope import frequencies_of, planes_of
from .hook import NAME, positions_in_rows, text_positions
from .once import Once

__all__ = ["Frame", "Framing", "Phases", "Rotation"]

Frame: TypeAlias = Callable[[Tensor], Tensor]
"""From the positions of tokens to those that their keys are cached at, float64 both."""
Phases: TypeAlias = tuple[Tensor, ...]
"""Cosine and sine of turns in the form that `Rotation.turn` takes, one row for each token."""
Pairing: TypeAlias = Literal["halves", "neighbours"]
"""Channel i turns with i + D/2, or 2i with 2i + 1."""
_CHUNK = 2**18
"""Numbers that are turned at once on the CPU: what one core's cache holds with its results."""


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
        if len(self.planes) != 2 * len(self.planes.unique()):
            raise ModelError(
                f"model type {model.config.model_type!r} has cos and sin of {len(self.planes)} "
                f"channels for {len(self.planes.unique())} planes: methods that change distances "
                "cannot turn its queries. Methods that change frequencies may work."
            )
        try:
            self.pairing: Pairing | None = _pairing(self._apply, self.planes)
        except Exception as error:  # the model's own code, with another signature or layout
            raise ModelError(
                f"model type {model.config.model_type!r} has an apply_rotary_pos_emb that cannot "
                f"be called with queries, cos and sin ({type(error).__name__}: {error}): methods "
                "that change distances cannot turn its queries. Methods that change frequencies "
                "may work."
            ) from error
        """How channels form planes; None where it is the model's function that knows."""

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

    def phases(self, positions: Tensor) -> Phases:
        """What turns tokens by so many positions [S]."""
        return _phases(self.pairing, self.planes, *self.cos_sin(positions))

    def turn(self, x: Tensor, phases: Phases) -> Tensor:
        """Turn x [B, heads, S, head_dim] by phases of S tokens; channels beyond D stay."""
        if self.pairing is None:
            width = phases[0].shape[-1]
            turning, rest = x[..., :width], x[..., width:]
            precise = torch.promote_types(x.dtype, torch.float32)
            turned = _by_model(self._apply, turning.to(precise), *phases).to(x.dtype)
            return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
        if x.requires_grad and torch.is_grad_enabled():
            return _Turn.apply(x, self.pairing, *phases)  # pyright: ignore[reportReturnType]
        return _turned(x, self.pairing, *phases)


def _by_model(function: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The model's own function, which turns queries and keys at once, or one of them (Gemma-4)."""
    if "k" in inspect.signature(function).parameters:
        return function(x, x[:, :0], cos[None], sin[None])[0]
    return function(x, cos[None], sin[None], unsqueeze_dim=1)


def _pairing(function: Any, planes: Tensor) -> Pairing | None:
    """Which of the two ways gives what the model's own function gives."""
    width = len(planes)
    phase = torch.arange(1.0, 1 + width // 2).cumsum(0)[planes] * torch.tensor([[0.7], [-1.9]])
    cos, sin = phase.cos(), phase.sin()
    x = torch.linspace(-2, 2, 2 * 2 * width).sin().reshape(1, 2, 2, width)
    wanted = _by_model(function, x, cos, sin)
    pairings: tuple[Pairing, ...] = ("halves", "neighbours")
    for pairing in pairings:
        found = _turned(x, pairing, *_phases(pairing, planes, cos, sin))
        if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0, atol=1e-6):
            return pairing
    return None


def _phases(pairing: Pairing | None, planes: Tensor, cos: Tensor, sin: Tensor) -> Phases:
    """For halves cos of each channel and sin of each plane, for neighbours both as complex."""
    if pairing is None:
        return cos, sin
    half = len(planes) // 2
    beside = bool((planes[:2] == 0).all())  # where the model repeats each plane's cos in place
    cos, sin = (x[..., ::2] if beside else x[..., :half] for x in (cos, sin))
    if pairing == "halves":
        return torch.cat([cos, cos], dim=-1), sin.contiguous()
    return (torch.complex(cos, sin),)


class _Turn(torch.autograd.Function):
    """Turning by −φ is the gradient of turning by φ."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, pairing: Pairing, *phases: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*phases)
        ctx.pairing = pairing
        return _turned(x, pairing, *phases)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        *cos, sin = ctx.saved_tensors
        back = (*cos, -sin) if ctx.pairing == "halves" else (sin.conj(),)
        return _turned(grad, ctx.pairing, *back), None, *(None for _ in back)


def _turned(x: Tensor, pairing: Pairing, *phases: Tensor) -> Tensor:
    """Turn x [B, heads, S, head_dim], a few tokens at a time where a cache is to be kept to."""
    out = torch.empty_like(x)
    batch, heads, tokens, dim = x.shape
    width = 2 * phases[-1].shape[-1]
    if width < dim:
        out[..., width:] = x[..., width:]
    precise = torch.promote_types(x.dtype, torch.float32)
    turn = _turn_halves if pairing == "halves" else _turn_neighbours
    step = max(1, _CHUNK // max(1, batch * heads * dim)) if x.device.type == "cpu" else tokens
    for first in range(0, tokens, max(1, step)):
        part = slice(first, first + step)
        piece, place = x[:, :, part, :width].to(precise), out[:, :, part, :width]
        into = place if place.dtype == precise else torch.empty_like(piece)
        turn(piece, into, *(phase[part] for phase in phases))
        if into is not place:
            place.copy_(into)
    return out


def _turn_halves(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor) -> None:
    torch.mul(x, cos, out=out)
    half = sin.shape[-1]
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)


def _turn_neighbours(x: Tensor, out: Tensor, phase: Tensor) -> None:
    pairs = x.unflatten(-1, (-1, 2))
    if any(stride % 2 for stride in (*pairs.stride()[:-1], pairs.storage_offset())):
        pairs = pairs.contiguous()
    out.copy_(torch.view_as_real(torch.view_as_complex(pairs) * phase).flatten(-2))


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
    def suspended(self) -> Generator[None]:
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
        used: Any = self.rotation.decoder.config
        if used._attn_implementation != NAME:
            raise ModelError(
                f"the model's keys are turned for longctx's attention, and its attention is "
                f"{used._attn_implementation!r} now: call "
                f"model.set_attn_implementation({NAME!r}), or remove the patch."
            )
        positions = text_positions(positions)
        dtype = native[0].dtype
        mask: Any = kwargs.get("attention_mask")
        embeddings = self._once.get(
            lambda: self._embeddings(positions_in_rows(positions, mask), dtype),
            *(positions, mask, dtype),
        )
        return args, {**kwargs, "position_embeddings": embeddings}

    def _embeddings(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotation.cos_sin(self.frame(positions.double()))
        scaling = self.rotation.scaling
        return (cos * scaling).to(dtype), (sin * scaling).to(dtype)
