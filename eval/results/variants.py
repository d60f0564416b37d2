"""The methods of a sweep, tried out on the model before any work is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from longctx.attention.hook import ATTRIBUTE
from longctx.core import extend_all
from longctx.errors import LongctxError, ModelError, RunError
from longctx.fingerprint import effect_digest, json_digest
from longctx.model import rope_of, scaled_rope, text_config, window
from longctx.patch import Method, methods_of, patch_of
from longctx.reading.read import Reading, parse_reading
from longctx.registry import parse_methods
from longctx.scoring.compressed_caches import CacheLike, CompressedCache, Press, parse_cache

__all__ = [
    "Variant",
    "label",
    "label_of",
    "original_window",
    "parse_variant",
    "variants_of",
    "with_caches",
]

_SHOWN = 4  # values of a list that a label writes out


@dataclass(frozen=True, slots=True)
class Variant:
    """A method, or several on top of each other, as a sweep uses it."""

    label: str
    """As the command line writes it: "none", "yarn:8", "yarn:2 + log_n"."""
    methods: tuple[Method, ...]
    """The lowest first; none: the model as it came."""
    factor: float | None
    """Window over original window, None where neither factor nor target is part of the method."""
    window: int | None
    """Tokens the model claims to read with it."""
    length_invariant: bool
    effect: str = ""
    """Digest of what the method puts on this model."""
    reading: Reading | None = None
    """How prompts are read in pieces; None: as a whole."""
    cache: CompressedCache | None = None
    """What the contexts of prompts are kept in; None: the full cache."""
    note: str = ""
    """What the window does not say of the methods."""

    @contextmanager
    def applied(self, model: PreTrainedModel, *, replace: bool) -> Generator[None]:
        """Have the methods on the model inside the block."""
        patches = extend_all(model, self.methods, replace=replace)
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.remove()

    def record(self) -> dict[str, Any] | None:
        """Name, fields and effect, as JSON; with a compressed cache both."""
        if self.cache is not None:
            return {"cache": self.cache.record(), "method": self._method_record()}
        return self._method_record()

    def _method_record(self) -> dict[str, Any] | None:
        if self.reading is not None:
            return {"name": self.reading.name, **dataclasses.asdict(self.reading)}
        if not self.methods:
            return None
        fields = [_fields(method) for method in self.methods]
        own = fields[0] if len(fields) == 1 else {"methods": fields}
        return {**own, "effect": self.effect}


def _fields(method: Method) -> dict[str, Any]:
    settings: Any = method
    return {"name": method.name, **dataclasses.asdict(settings)}


def label(method: Method | None) -> str:
    """Write a method as the command line does, without what is at its default.

    Of a long list (the divisors of longrope) its length and a digest stand.

    >>> from longctx.patches.yarn import Yarn
    >>> label(Yarn(factor=8)), label(Yarn(target=4096, beta_fast=16))
    ('yarn:8', 'yarn:target=4096,beta_fast=16')
    """
    if method is None:
        return "none"
    settings: Any = method
    items: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.default is not dataclasses.MISSING and value == field.default:
            continue
        if field.name == "factor" and not items:
            items.append(f"{value:g}" if float(f"{value:g}") == value else repr(value))
        elif isinstance(value, tuple) and len(value) > _SHOWN:
            items.append(f"{field.name}={len(value)}@{json_digest(value)[:6]}")
        else:
            items.append(f"{field.name}={value}")
    return method.name + (":" + ",".join(items) if items else "")


def original_window(model: PreTrainedModel) -> int | None:
    """Tokens the model was trained to read, whatever extends it now; None if it names none."""
    patch = patch_of(model)
    if patch is not None:
        return patch.rope.length
    try:
        return rope_of(model).length
    except ModelError:  # no rotary: learned positions, ALiBi, a recurrent state
        return window(model)


def variants_of(
    model: PreTrainedModel,
    methods: Sequence[Method | Reading | str | None] | str | None,
    *,
    replace: bool,
) -> list[Variant]:
    """Put each method on the model and take it off again, so that an impossible one fails now.

    Args:
        model: as it came; a patch may be in place.
        methods: instances, names as the command line writes them, None or "none" for the model as
            it came, a `Reading` ("read:map") for that model reading in pieces; None in all: the
            model as it came alone.
        replace: see `longctx.extend`.

    Raises:
        MethodError: what cannot be put on this model.
        RunError: none, or the same one twice.
    """
    if isinstance(methods, str):
        methods = [methods]
    found: list[Variant] = []
    for method in methods or [None]:
        wanted = parse_variant(method) if isinstance(method, str) else method
        if isinstance(wanted, Reading):
            came = _as_it_came(model)
            name = f"{wanted}" if came.label == "none" else f"{came.label} + {wanted}"
            found.append(dataclasses.replace(came, label=name, window=None, reading=wanted))
        else:
            layers = wanted if isinstance(wanted, tuple) else () if wanted is None else (wanted,)
            found.append(_tried(model, layers, replace=replace))
    labels = [variant.label for variant in found]
    for name in labels:
        if labels.count(name) > 1:
            raise RunError(f"method {name!r} is asked for twice: leave one out.")
    return found


def with_caches(
    model: PreTrainedModel,
    variants: Sequence[Variant],
    caches: Sequence[CacheLike] | CacheLike,
    *,
    replace: bool,
) -> list[Variant]:
    """Each variant with each cache, after trying whether the two go together.

    Args:
        model: as for `variants_of`.
        variants: of it.
        caches: instances, presses of kvpress, or as the command line writes them; "full" or None is
            the model's own cache.
        replace: see `longctx.extend`.

    Raises:
        RunError: the same cache twice, or one that cannot be right under a method.
        ModelError: one that this model cannot have.
    """
    several = caches if isinstance(caches, Sequence) and not isinstance(caches, str) else [caches]
    kinds = [_cache(cache) for cache in several] or [None]
    names = ["full" if kind is None else str(kind) for kind in kinds]
    for name in names:
        if names.count(name) > 1:
            raise RunError(f"cache {name!r} is asked for twice: leave one out.")
    if not any(kinds):
        return [*variants]
    found: list[Variant] = []
    for variant in variants:
        with variant.applied(model, replace=replace):
            found += [variant if kind is None else _kept_in(kind, variant, model) for kind in kinds]
    return found


def label_of(method: str, cache: CompressedCache) -> str:
    """Write a method with a cache: "yarn:4 · quantized:4"."""
    return f"{method} · {cache}"


def _cache(cache: CacheLike) -> CompressedCache | None:
    if cache is None or isinstance(cache, CompressedCache):
        return cache
    return parse_cache(cache) if isinstance(cache, str) else Press(cache)


def _kept_in(kind: CompressedCache, variant: Variant, model: PreTrainedModel) -> Variant:
    """A variant, which is on the model, with a cache."""
    _refuse_together(model, variant, kind)
    return dataclasses.replace(
        variant,
        label=label_of(variant.label, kind),
        length_invariant=False,  # a shorter context is compressed otherwise
        cache=kind.fitted(model),
    )


def _refuse_together(model: PreTrainedModel, variant: Variant, kind: CompressedCache) -> None:
    """Refuse what would give figures of something else."""
    both = f"{variant.label} with {kind}"
    if variant.reading is not None:
        raise RunError(f"{both}: reading in pieces makes caches of its own. Leave one out.")
    if not variant.length_invariant:
        raise RunError(
            f"{both}: the frequencies of {variant.label} follow the length of the request, and a "
            "context that is prefilled alone is shorter than that. Leave one out."
        )
    patch = patch_of(model)
    while patch is not None:
        if patch.method.cache_tokens(patch.window_below) is not None:
            raise RunError(
                f"{both}: {patch.method.name} keeps a bounded cache of its own, which no other can "
                "stand in for. Leave one out."
            )
        patch = patch.below
    ruled = any(getattr(module, ATTRIBUTE, None) is not None for module in model.modules())
    if ruled and kind.evicts:
        raise RunError(
            f"{both}: attention under {variant.label} counts distances by places in the cache, and "
            f"{kind} drops keys, so that places are not positions. quantized keeps all of them."
        )


def _tried(model: PreTrainedModel, methods: tuple[Method, ...], *, replace: bool) -> Variant:
    """What a model is under these methods, which are put on and taken off again."""
    if not methods:
        return _as_it_came(model)
    variant = Variant("", methods, None, None, length_invariant=True)
    with variant.applied(model, replace=replace):
        came = _as_it_came(model)
        return dataclasses.replace(came, methods=methods, effect=effect_digest(model))


def parse_variant(text: str) -> tuple[Method, ...] | Reading:
    """Read methods, or a way of reading in pieces, as the command line writes it.

    Raises:
        LongctxError: unknown, or settings that cannot be used.
    """
    return parse_reading(text) if text.partition(":")[0] == Reading.name else parse_methods(text)


def _as_it_came(model: PreTrainedModel) -> Variant:
    patch = patch_of(model)
    factor, claimed = (patch.factor, patch.window) if patch else (None, window(model))
    if patch and patch.below and patch.window:  # whose own factor counts on the window below
        factor = patch.window / patch.rope.length
    notes: list[str] = []
    below = patch
    while below is not None:
        notes.insert(0, below.method.window_note(below.rope))
        below = below.below
    labels = " + ".join(map(label, methods_of(model))) or "none"
    said = "; ".join(filter(None, notes))
    return Variant(labels, (), factor, claimed, _invariant(model), note=said)


def _invariant(model: PreTrainedModel) -> bool:
    if methods := methods_of(model):
        return all(method.length_invariant for method in methods)
    try:
        return scaled_rope(text_config(model)) not in ("dynamic", "longrope")
    except LongctxError:  # no RoPE at all
        return True
