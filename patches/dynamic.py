"""Dynamic NTK: the base follows the length of the request.

    b' = b · (f·T/L − (f − 1))^(d/(d−2)),  T = prompt + new tokens, at least L

Inside the original window nothing changes. T is settled before the first token of a request is
read and kept to its end, so that every cached key was turned by the base its queries use;
`generate` does this by itself. Each row of a batch is a request, and its T belongs to the cache.
transformers' own `dynamic` lets the base grow while older keys keep the former one, and never
scales once `max_position_embeddings` is raised; it agrees with this where a whole input is read in
one pass.

Source: emozilla 2023 ("Dynamically scaled RoPE"); YaRN (arXiv:2309.00071), appendix B.1.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longctx.errors import MethodError
from longctx.model import decoder_of, put_rotary, rotary_of, text_config
from longctx.patch import Check, Method, Patch
from longctx.rope import Frequencies, Rope, ScaledRotary, frequencies_of

from ._frequency import frequency_checks, install_rope, position_check
from ._scale import check_extent, scale

__all__ = ["METHOD", "Dynamic", "reserve"]

_BEGUN = "longctx_requests"
"""The attribute of a cache that holds T of each of its rows."""
_ROWS = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")
"""The methods of a cache that move its rows."""
_DEFAULT = 20
"""New tokens where no length is asked for: transformers' default."""
_turns: weakref.WeakKeyDictionary[nn.Module, RLock] = weakref.WeakKeyDictionary()
"""For each rotary, what threads that generate wait for."""
_log = logging.getLogger(__name__)


class RequestRotary(ScaledRotary):
    """A rotary whose base is fixed for each request, a row of a batch, from its first token on.

    What a request was begun for is kept on its cache, so that requests may take turns, and a cache
    may be copied, cropped or handed to a later call.
    """

    def __init__(self, native: nn.Module, layer_type: str | None, window: int) -> None:
        super().__init__(native, layer_type)
        self.window = window
        self.reserved = window
        """Tokens that every request is begun for at least."""
        self.asked: tuple[int, ...] | None = None
        """T of each prompt inside `generate`."""
        self.requests: tuple[int, ...] = (window,)
        """T of each row that is being read; one number before anything is."""
        self.length = 0

    def forward(
        self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [batch, seq, d], each row at its request's base."""
        native = super().forward
        if self.layer_type is not None and self.layer_type not in (*args, *kwargs.values()):
            return native(x, position_ids, *args, **kwargs)
        lengths = sorted(set(self.requests))
        if len(lengths) == 1:
            self.settle(lengths[0])
            return native(x, position_ids, *args, **kwargs)
        rows = torch.tensor(self.requests, device=x.device)[:, None, None]
        whole: Any = None
        for length in lengths:
            self.settle(length)
            turned: Any = native(x, position_ids, *args, **kwargs)
            if whole is None:
                whole = turned
            elif isinstance(turned, Tensor):  # complex numbers
                whole = torch.where(rows == length, turned, whole)
            else:
                both = zip(turned, whole, strict=True)
                whole = tuple(torch.where(rows == length, its, other) for its, other in both)
        return whole

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

    def begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the requests that this call of the decoder reads; a forward pre-hook."""
        call = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        read_now: Tensor | None = embeds if ids is None else ids
        if read_now is None:  # the head alone is run, with hidden states that were kept
            return
        batch, tokens = read_now.shape[:2]
        cache: Cache | None = call.get("past_key_values", call.get("cache"))
        read = 0 if cache is None else int(cache.get_seq_length())
        positions: Tensor | None = call.get("position_ids")
        if positions is None:
            positions = torch.arange(read, read + tokens)[None]
        mask: Tensor | None = call.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            mask = None
        if read:
            assert cache is not None
            self.requests = _repeated(_begun(cache, read), batch)
            if self.asked is None:  # generate discards what it tries beyond its end
                self._refuse_outgrown(positions, mask, batch)
        else:
            ends = _ends(positions, mask)
            asked = self.asked or (self.reserved,)
            both = zip(_repeated(ends, batch), _repeated(asked, batch), strict=True)
            self.requests = tuple(map(max, both))

    def _refuse_outgrown(self, positions: Tensor, mask: Tensor | None, batch: int) -> None:
        last = mask[:, -positions.shape[-1] :] if mask is not None else None
        ends = _repeated(_ends(positions, last), batch)
        for end, length in zip(ends, self.requests, strict=True):
            if end > length:
                raise MethodError(
                    f"dynamic: this request was begun for {length} tokens and its cached keys are "
                    f"turned for that length; position {end - 1} lies beyond. Use model.generate, "
                    "or `with longctx.patches.dynamic.reserve(model, tokens):` around the first "
                    "call that fills the cache."
                )

    def remember(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Keep on the cache what its requests were begun for; a forward hook."""
        del decoder, args, kwargs
        for cache in output.values() if isinstance(output, dict) else output:
            if isinstance(cache, Cache):
                setattr(cache, _BEGUN, self.requests)
                for name in _ROWS if _ROWS[0] not in vars(cache) else ():
                    # Partial objects are copied and pickled with the cache.
                    setattr(cache, name, functools.partial(_move_rows, cache, name))


def _ends(positions: Tensor, mask: Tensor | None) -> list[int]:
    """Tokens of each row up to its last real one.

    Args:
        positions: in tokens, [batch or 1, seq]; of several dimensions, [dims, batch or 1, seq].
        mask: true for real tokens, [batch, seq]; None where all are.
    """
    if positions.ndim == 3:
        positions = positions.amax(0)
    if mask is None:
        return (positions.amax(-1) + 1).tolist()
    real = mask.bool().to(positions.device)
    positions = positions.expand(len(real), -1)
    first = positions.gather(1, real.int().argmax(1, keepdim=True))[:, 0]
    shift = first.where(~real[:, 0], 0)  # padding on the left may count as positions, or not
    return (positions.masked_fill(~real, -1).amax(-1) + 1 - shift).tolist()


def _repeated(rows: Sequence[int], batch: int) -> tuple[int, ...]:
    """A figure for each of `batch` rows, where beams or answers multiply the rows of a prompt.

    Raises:
        MethodError: the batch is no multiple of the rows.
    """
    copies, rest = divmod(batch, len(rows))
    if rest or not copies:
        raise MethodError(
            f"dynamic: the cache or prompts have {len(rows)} rows begun for {min(rows)} to "
            f"{max(rows)} tokens, and the call has {batch}: expected as many, or a multiple."
        )
    return tuple(row for row in rows for _ in range(copies))


def _move_rows(cache: Cache, name: str, rows: Any) -> None:
    """Reorder, select or repeat the rows of a cache, and what they were begun for with them."""
    getattr(type(cache), name)(cache, rows)
    begun: tuple[int, ...] = getattr(cache, _BEGUN)
    if name == "batch_repeat_interleave":
        moved = _repeated(begun, len(begun) * rows)
    elif len(set(begun)) == 1:
        moved = begun[:1] * len(rows)
    else:
        moved = tuple(begun[row] for row in rows.tolist())
    setattr(cache, _BEGUN, moved)


def _begun(cache: Cache, read: int) -> tuple[int, ...]:
    begun: tuple[int, ...] | None = getattr(cache, _BEGUN, None)
    if begun is None:
        raise MethodError(
            f"dynamic: nothing is known of the {read} tokens in this {type(cache).__name__}: it "
            "was filled before the model was extended, or put together by hand. Pass an empty "
            "cache."
        )
    return begun


@contextmanager
def reserve(model: PreTrainedModel, tokens: int) -> Generator[None]:
    """Begin requests inside the block for at least `tokens` tokens (prompt and answer together).

    A chat that is to keep its cache from turn to turn is begun for all its turns in this way.

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
    """`generate` with T settled first; it stands in place of the model instance's own.

    Threads take turns: what is being read stands on the one rotary that they share.
    """
    rotary = _rotary(model)
    kind: Any = type(model)
    plain = kind.generate
    call = inspect.signature(plain).bind(model, *args, **kwargs).arguments
    given: dict[str, Any] = {**call, **call.pop("kwargs", {})}
    if not _is_length_named(model, given):  # transformers' own default ends at the old window
        kwargs["max_new_tokens"] = given["max_new_tokens"] = _DEFAULT
    asked = _asked(model, given)
    cache = given.get("past_key_values")
    if isinstance(cache, Cache) and cache.get_seq_length():
        kwargs["past_key_values"] = _fitting(model, cache, asked)
    draft = given.get("assistant_model")
    with _turns.setdefault(rotary, RLock()), ExitStack() as begun:
        before = rotary.asked
        rotary.asked = asked
        try:
            if draft is not None and isinstance(rotary_of(draft), RequestRotary):
                begun.enter_context(reserve(draft, max(asked)))  # else every guess is a request
            return plain(model, *args, **kwargs)
        finally:
            rotary.asked = before


def _asked(model: PreTrainedModel, given: dict[str, Any]) -> tuple[int, ...]:
    """T of each prompt of a call of `generate`: its tokens and those to come, without padding.

    Args:
        model: in place.
        given: the arguments by name.
    """
    prepare: Any = model._prepare_generation_config  # pyright: ignore[reportPrivateUsage]
    lengths = {key: given[key] for key in ("max_new_tokens", "max_length") if key in given}
    config: Any = prepare(given.get("generation_config"), **lengths)[0]
    named = (given.get(key) for key in ("inputs", "input_ids", "inputs_embeds"))
    prompt = next((x for x in named if isinstance(x, Tensor)), None)
    batch, read = (1, 1) if prompt is None else prompt.shape[:2]
    new = config.max_new_tokens
    total = read + new if new is not None else max(config.max_length, read)
    mask = given.get("attention_mask")
    if mask is None and prompt is not None and not prompt.is_floating_point():
        mask = _inferred_mask(prompt, config)
    padding = [0] * batch
    if isinstance(mask, Tensor) and mask.ndim == 2:  # that before the first real token
        padding = (mask.bool().cumsum(1) == 0).sum(1).tolist()
    return tuple(max(total - own, _rotary(model).reserved) for own in padding)


def _is_length_named(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether a call of `generate` says how long its texts may become."""
    configs = (given.get("generation_config"), model.generation_config)
    return any(
        getattr(config, key, None) is not None or given.get(key) is not None
        for config in configs
        for key in ("max_new_tokens", "max_length")
    )


def _inferred_mask(ids: Tensor, config: Any) -> Tensor | None:
    """What `generate` takes for padding where no mask is passed; None where that is nothing."""
    pad, end = config.pad_token_id, config.eos_token_id
    if pad is None or pad in (end if isinstance(end, list) else [end]):
        return None
    return ids != pad


def _fitting(model: PreTrainedModel, cache: Cache, asked: tuple[int, ...]) -> Cache:
    """The cache if its requests were begun for these lengths, else an empty one of its kind.

    Raises:
        MethodError: a cache that cannot be begun anew.
    """
    read = int(cache.get_seq_length())
    begun = _begun(cache, read)
    if begun == asked:
        return cache
    if type(cache) is not DynamicCache:
        raise MethodError(
            f"dynamic: the {read} tokens in this {type(cache).__name__} were begun for "
            f"{max(begun)} tokens, and this call needs {max(asked)}: pass an empty cache, or "
            "begin the first call inside `with longctx.patches.dynamic.reserve(model, tokens):`."
        )
    _log.warning(
        "dynamic: the cache was begun for %d tokens and this call needs %d: its %d tokens are read "
        "anew. `longctx.patches.dynamic.reserve` around the first call keeps it.",
        *(max(begun), max(asked), read),
    )
    return DynamicCache(config=text_config(model))


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

    def window_note(self, rope: Rope) -> str:
        """That there is no longest request, and how one is scaled."""
        f = scale(self.name, self.factor, self.target, rope)
        length = max(2 * rope.length, int(f * rope.length))
        stretch = f * length / rope.length - (f - 1)
        return (
            f"dynamic leaves the config's window at {rope.length:,} tokens: a longer request is "
            f"scaled to its own length, whatever that is ({length:,} tokens as by ntk:{stretch:g})"
        )

    def native_rope(self, rope: Rope) -> dict[str, Any]:
        """`rope_type: dynamic`, which reads L from `max_position_embeddings`: it must not grow."""
        f = scale(self.name, self.factor, self.target, rope)
        return rope.parameters("dynamic", factor=f)

    def apply(self, model: PreTrainedModel, patch: Patch) -> None:
        """Install the per-request rotary and a `generate` that settles the length first."""
        static = install_rope(model, patch, self.native_rope(patch.rope), patch.rope.length)
        rotary = RequestRotary(static.native, patch.rope.layer_type, patch.rope.length)
        decoder = decoder_of(model)
        put_rotary(model, rotary, patch.set)
        rotary.settle(patch.rope.length)
        patch.hook(decoder, rotary.begin)
        patch.hook(decoder, rotary.remember, after=True)
        if hasattr(model, "generate"):
            # A partial object is pickled with the model; a bound method would look for its name.
            patch.set(model, "generate", functools.partial(_generate, model))

    def reserve(self, model: PreTrainedModel, tokens: int) -> AbstractContextManager[None]:
        """Settle the base for that many tokens; see the function of this name."""
        return reserve(model, tokens)

    def verify(self, model: PreTrainedModel, patch: Patch) -> list[Check]:
        """Settle for twice the window, compare with the formula, and settle back."""
        rope, rotary = patch.rope, _rotary(model)
        before = rotary.requests
        probe = 2 * rope.length
        wanted = self.frequencies(rope, probe)
        rotary.requests = (probe,)
        rotary.settle(probe)
        try:
            checks = frequency_checks(rotary, rope, wanted)
            checks.append(position_check(rotary, rope, wanted, probe))
        finally:
            rotary.requests = before
            rotary.settle(before[0])
        held = int(text_config(model).max_position_embeddings)
        checks.append(
            Check("window kept", held == rope.length, f"max_position_embeddings is {held} = L")
        )
        return checks


METHOD = Dynamic
