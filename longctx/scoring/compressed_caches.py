"""Caches that keep less than every key at full precision, written as a command line names them.

    quantized:4                                     all keys and values, in 4 bits
    sliding:512                                     the last ones only
    kvpress:SnapKVPress,compression_ratio=0.5       those that a press of NVIDIA's kvpress keeps

A context is prefilled into such a cache, and what follows is read over what it kept
(`over_cache.py`). While the context is prefilled its tokens see each other as they always do; what
is lost is lost to the tokens that come after it.

Sources: transformers' `QuantizedCache`, after KIVI (Liu et al. 2024, arXiv:2402.02750), and its
`DynamicSlidingWindowLayer`; kvpress (github.com/NVIDIA/kvpress), whose presses are context
managers, `with press(model): …`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..before_transformers_5_24 import cache_argument
from ..errors import ModelError, RunError, nearest
from ..model import text_config
from ..registry import parse_fields
from .token_scores import prefill

__all__ = ["CacheLike", "CompressedCache", "Press", "Quantized", "Sliding", "parse_cache"]

_Backend = Literal["hqq", "quanto", "fp8"]
_BITS: Mapping[str, tuple[int, ...]] = {"hqq": (1, 2, 3, 4, 8), "quanto": (2, 4), "fp8": (8,)}
_TOGETHER: Mapping[int, int] = {4: 2, 2: 4, 1: 8}
_GROUPS = (64, 32, 16, 8)
_INSTALL = {
    "hqq": "pip install 'longctx-toolkit[quantized]'",
    "optimum.quanto": "pip install optimum-quanto ninja (it compiles a kernel when first used)",
    "kvpress": "pip install --no-deps kvpress cachetools fire termcolor "
    "(0.5.5 pins transformers below 5.3)",
}
_FORMS = "full, quantized:4, sliding:512 or kvpress:SnapKVPress,compression_ratio=0.5"


class CompressedCache(ABC):
    """How the keys and values of a context are kept."""

    name: ClassVar[str]
    evicts: ClassVar[bool] = True
    """Whether keys are dropped, so that places in the cache are not positions in the text."""

    @abstractmethod
    def new_cache(self, model: PreTrainedModel) -> Cache:
        """An empty cache for one prompt.

        Raises:
            ModelError: a model whose cache cannot be of this kind.
        """

    def compressing(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """What the context is prefilled inside."""
        del model
        return nullcontext()

    def arguments(self, tokens: int, device: torch.device) -> dict[str, Any]:
        """Further arguments of the decoder while a context of so many tokens is prefilled."""
        del tokens, device
        return {}

    def record(self) -> dict[str, Any]:
        """Name and settings, as JSON."""
        settings: Any = self
        return {"name": self.name, **dataclasses.asdict(settings)}

    def fitted(self, model: PreTrainedModel) -> CompressedCache:
        """The same with what it leaves open settled for a model, before any work is done.

        Raises:
            ModelError: a model that keeps no cache of this kind; it names the reason.
        """
        self._probed(model)
        self.new_cache(model)
        return self

    def _probed(self, model: PreTrainedModel) -> Cache:
        """The model's own cache after one token."""
        stateful = bool(getattr(model, "_is_stateful", False))
        if stateful or cache_argument(model.base_model.forward) is None:
            raise ModelError(
                f"{self} keeps keys and values, and model type {model.config.model_type!r} keeps a "
                "recurrent state: measure it with --caches full."
            )
        cache = DynamicCache(config=text_config(model))
        prefill(model, torch.zeros(1, 1, dtype=torch.int64), cache)
        others = {type(x).__name__ for x in cache.layers if type(x) is not DynamicLayer}
        if others:
            raise ModelError(
                f"{self} stands in for layers that keep every key, and this model's (type "
                f"{model.config.model_type!r}) keep a {', '.join(sorted(others))} of their own: "
                "measure it with --caches full."
            )
        return cache


@dataclass(frozen=True, slots=True)
class Quantized(CompressedCache):
    """All keys and values in fewer bits: transformers' `QuantizedCache`.

    What is read after the context stays at full precision until there are `residual_length` tokens
    of it (fp8: each token is quantized as it comes).
    """

    bits: int = 4
    """Of a number: 1, 2, 3, 4 or 8 with hqq, 2 or 4 with quanto, 8 with fp8."""
    backend: _Backend = "hqq"
    """hqq (PyTorch alone, the extra "quantized"), quanto, or fp8, which needs no package."""
    group_size: int | None = None
    """Numbers that share a scale and a zero point; None: 64, or the largest power of two below that
    the keys and values of one token can be cut into. fp8 has one scale for a layer."""
    residual_length: int = 128
    """Newest tokens that are quantized together."""

    name: ClassVar[str] = "quantized"
    evicts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.backend not in get_args(_Backend):
            raise RunError(f"{self.name}: backend={self.backend!r}: expected hqq, quanto or fp8.")
        if type(self.bits) is not int or self.bits not in _BITS[self.backend]:
            known = ", ".join(map(str, _BITS[self.backend]))
            raise RunError(f"{self.name}: bits={self.bits!r}: {self.backend} has {known}.")
        _check_whole(self.name, "group_size", self.group_size or 64)
        _check_whole(self.name, "residual_length", self.residual_length)
        if self.backend == "fp8" and (self.group_size, self.residual_length) != (None, 128):
            raise RunError(
                f"{self.name}: fp8 has one scale for a layer and quantizes each token as it comes: "
                "leave group_size and residual_length out."
            )

    def __str__(self) -> str:
        return _written(self.name, self, first="bits")

    def fitted(self, model: PreTrainedModel) -> CompressedCache:
        """The same with a group size that cuts the keys and values of any number of tokens.

        Raises:
            ModelError: there is none, or the one that was asked for does not.
        """
        self._refuse_missing_backend()
        layers: list[Any] = self._probed(model).layers
        if self.backend == "fp8":
            self.new_cache(model)
            return self
        numbers = math.gcd(*(x.numel() for layer in layers for x in (layer.keys, layer.values)))
        # hqq packs as many groups as a byte holds numbers, and drops what is left over.
        together = _TOGETHER.get(self.bits, 1) if self.backend == "hqq" else 1
        fitting = [size for size in _GROUPS if numbers % (size * together) == 0]
        wanted = self.group_size or (fitting[0] if fitting else _GROUPS[-1])
        if numbers % (wanted * together):
            known = f"pass group_size={fitting[0]}" if fitting else "choose other bits"
            raise ModelError(
                f"{self}: {numbers} numbers of a token (kv heads × head_dim) cannot be cut into "
                f"groups of {wanted}, of which {self.backend} packs {together} together: {known}."
            )
        settled = dataclasses.replace(self, group_size=wanted)
        settled.new_cache(model)
        return settled

    def new_cache(self, model: PreTrainedModel) -> Cache:
        """Keys and values in groups along a head, as either package takes them.

        Raises:
            ModelError: a model with other layers than those of full attention.
            RunError: the package is not installed.
        """
        self._refuse_missing_backend()
        if self.backend != "fp8" and self.group_size is None:
            return self.fitted(model).new_cache(model)
        axis = 1 if self.backend == "hqq" else 0  # rows of `group_size` numbers, in either's words
        grouped = {
            "nbits": self.bits,
            "axis_key": axis,
            "axis_value": axis,
            "q_group_size": self.group_size,
            "residual_length": self.residual_length,
        }
        settings: dict[str, Any] = {} if self.backend == "fp8" else grouped
        try:
            return QuantizedCache(backend=self.backend, config=text_config(model), **settings)
        except (ImportError, ValueError, TypeError) as error:
            raise ModelError(f"{self} cannot be the cache of this model: {error}") from error

    def _refuse_missing_backend(self) -> None:
        package = {"hqq": "hqq", "quanto": "optimum.quanto"}.get(self.backend)
        if package is not None:
            _refuse_missing(package, str(self))


@dataclass(frozen=True, slots=True)
class Sliding(CompressedCache):
    """The last keys and values: transformers' sliding layer in place of each that keeps all.

    It is not `sink_window`, which hides keys from the context's own tokens too and keeps the first
    ones: here the context is read as a whole, and then all but its end is dropped.
    """

    window: int = 512
    """Tokens that a token after the context sees, its own among them: window − 1 are kept."""

    name: ClassVar[str] = "sliding"

    def __post_init__(self) -> None:
        _check_whole(self.name, "window", self.window, least=2)

    def __str__(self) -> str:
        return f"{self.name}:{self.window}"

    def new_cache(self, model: PreTrainedModel) -> Cache:
        """Sliding layers, whatever the model's config says."""
        cache = DynamicCache(config=text_config(model))
        layers: Any = [DynamicSlidingWindowLayer(self.window) for _ in cache.layers]
        cache.layers = layers
        return cache


@dataclass(frozen=True, slots=True)
class Press(CompressedCache):
    """What a press keeps of a context that it sees without the question."""

    press: Any
    """As kvpress makes them: `with press(model):` compresses each layer's part of the cache at the
    end of its forward pass."""

    name: ClassVar[str] = "kvpress"

    def __post_init__(self) -> None:
        kind: type[Any] = type(self.press)
        if not callable(self.press) or isinstance(self.press, type):
            raise RunError(f"{self.press!r} is not a press: pass an instance, or {_FORMS}.")
        for known, why in _UNFIT.items():
            if known in [cls.__name__ for cls in kind.__mro__]:
                raise RunError(f"{self.name}: {kind.__name__} {why}: choose another press.")

    def __str__(self) -> str:
        return _written(f"{self.name}:{type(self.press).__name__}", self.press)

    def record(self) -> dict[str, Any]:
        """The press as it is written."""
        return {"name": self.name, "press": str(self)}

    def new_cache(self, model: PreTrainedModel) -> Cache:
        """Transformers' own, which the press cuts."""
        return DynamicCache(config=text_config(model))

    @contextmanager
    def compressing(self, model: PreTrainedModel) -> Generator[None]:
        """The press's hooks, for as long as the context is prefilled; the model is given back.

        Presses that draw at random draw the same for every prompt.

        Raises:
            RunError: a press that lets kvpress's attention hide keys, which then stay in the cache.
        """
        own = {module: _names(module) for module in model.modules()}
        try:
            with torch.random.fork_rng(), self.press(model):
                torch.manual_seed(0)
                yield
            if any(getattr(module, _MASKED, None) is not None for module in own):
                raise RunError(
                    f"{self} hides keys in attention and drops none, so that its cache is a full "
                    "one: choose a press that drops keys."
                )
        finally:
            for module, names in own.items():
                for name in _names(module) - names:
                    delattr(module, name)

    def arguments(self, tokens: int, device: torch.device) -> dict[str, Any]:
        """Places in the cache: by these a press tells a prefill, and transformers passes none."""
        return {"cache_position": torch.arange(tokens, device=device)}


_MASKED = "masked_key_indices"  # the attribute by which kvpress's attention hides keys
_UNFIT = {
    "DecodingPress": "compresses while it decodes, and here the context is",
    "PrefillDecodingPress": "compresses while it decodes, and here the context alone is",
    "DMSPress": "compresses while it decodes, and here the context alone is",
    "KeyRerotationPress": "moves keys to other positions than those that are read on from",
    "FinchPress": "needs the question before the context is compressed",
    "RestoreKVPress": "moves keys to other positions than those that are read on from",
}


CacheLike: TypeAlias = (
    CompressedCache | Callable[[PreTrainedModel], AbstractContextManager[Any]] | str | None
)
"""A cache, a press of kvpress, or either as the command line writes it; None is the full one."""


def _names(module: nn.Module) -> set[str]:
    """The attributes and the modules of a module."""
    return {*vars(module), *(name for name, _ in module.named_children())}


def parse_cache(text: str) -> CompressedCache | None:
    """Read a cache as the command line writes it; "full" keeps everything and is None.

    >>> parse_cache("quantized:2")
    Quantized(bits=2, backend='hqq', group_size=None, residual_length=128)
    >>> print(parse_cache("sliding:window=512"), parse_cache("full"))
    sliding:512 None

    Raises:
        RunError: an unknown cache, field or press, settings that cannot be, or a package that is
            not installed.
    """
    name = text.strip().partition(":")[0]
    kinds: dict[str, type[Any]] = {"quantized": Quantized, "sliding": Sliding}
    if text.strip() == "full":
        return None
    if name == Press.name:
        return _parse_press(text)
    if name == "full":
        raise RunError(f"{text.strip()!r}: full keeps everything and has no settings: write full.")
    if name not in kinds:
        known = ("full", *kinds, Press.name)
        raise RunError(f"unknown cache {name!r}{nearest(name, known)} (expected {_FORMS}).")
    names = [field.name for field in dataclasses.fields(kinds[name])]
    example = f"{name}:{names[0]}={512 if name == Sliding.name else 4}"
    _, fields = parse_fields(text, first=names[0], example=example, error=RunError)
    _refuse_unknown(name, fields, names)
    return kinds[name](**fields)


def _parse_press(text: str) -> Press:
    example = "kvpress:SnapKVPress,compression_ratio=0.5"
    _, fields = parse_fields(text, first="press", example=example, error=RunError)
    kind = fields.pop("press", None)
    if not isinstance(kind, str):
        raise RunError(f"{text!r} names no press: expected e.g. {example}.")
    _refuse_missing("kvpress", text.strip())
    try:
        presses: Any = importlib.import_module("kvpress")
    except ImportError as error:
        raise RunError(
            f"{text.strip()!r} needs kvpress, which cannot be imported ({error}): "
            f"{_INSTALL['kvpress']}."
        ) from error
    known = [name for name in dir(presses) if name.endswith("Press")]
    if kind not in known:
        raise RunError(
            f"kvpress has no {kind!r}{nearest(kind, known)} (presses: {', '.join(known)})"
        )
    made: Any = getattr(presses, kind)
    known_fields: dict[str, Any] = getattr(made, "__dataclass_fields__", {})
    if known_fields:
        _refuse_unknown(kind, fields, [f.name for f in known_fields.values() if f.init])
    try:
        press = made(**fields)
    except (TypeError, ValueError, AssertionError) as error:
        raise RunError(f"{text!r} cannot be made: {error} (expected e.g. {example}).") from error
    return Press(press)


def _refuse_unknown(name: str, fields: Mapping[str, Any], known: list[str]) -> None:
    for key in fields:
        if key not in known:
            raise RunError(
                f"{name} has no field {key!r}{nearest(key, known)} (fields: {', '.join(known)})"
            )


def _refuse_missing(package: str, what: str) -> None:
    """Refuse what needs a package that is not there."""
    outer = package.partition(".")[0]
    if find_spec(outer) is None or find_spec(package) is None:
        raise RunError(f"{what} needs {package}, which is not installed: {_INSTALL[package]}.")


def _check_whole(kind: str, name: str, value: object, least: int = 1) -> None:
    if type(value) is not int or not least <= value <= 2**30:
        raise RunError(f"{kind}: {name}={value!r}: expected a whole number, {least} or more.")


def _written(name: str, settings: Any, first: str | None = None) -> str:
    """As the command line writes it, without what is at its default."""
    items: list[str] = []
    for field in dataclasses.fields(settings) if dataclasses.is_dataclass(settings) else ():
        value = getattr(settings, field.name, None)
        if field.name == first:
            items.append(f"{value}")
        elif field.init and not (
            field.default is not dataclasses.MISSING and value == field.default
        ):
            items.append(f"{field.name}={value}")
    return name + (":" if first else ",") * bool(items) + ",".join(items)
