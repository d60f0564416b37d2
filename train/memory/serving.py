"""What it costs to serve a model: memory of weights and cache, bytes and FLOPs of a token.

    found = plan_serving("smollm2", ServingSettings(max_length=8192, memory=24.0))
    found.cache_bytes(8192), found.longest(batch=8), found.tokens_per_second(8192)

Reads the config alone. Times are bounds: a step of decoding reads all weights that it uses and the
cache once, a prompt takes its FLOPs, and a machine does neither faster than its bandwidth and its
TFLOP/s. `benchmarks/serving_cost.py` compares with a model that runs.

Legend: n tokens, B rows.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rich.table import Table
from transformers import PreTrainedConfig

from longctx.errors import ModelError, RunError
from longctx.model import original_length, rope_entry
from longctx.patch import Method
from longctx.registry import parse_methods

from .kv_cache import KvCache
from .model_spec import on_meta, read_config

__all__ = ["ServingPlan", "ServingSettings", "plan_serving"]

GIB = 2**30
Dtype = Literal["float32", "bfloat16", "float16", "float8"]
_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
_ROWS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings:
    """What is served on what."""

    max_length: int | None = None
    """Tokens of a row, prompt and answer; by default the window."""
    batch_size: int = 1
    """Rows at once."""
    method: str = "none"
    """As the command line writes it, several with a "+": some extend the window, some bound what
    caches keep."""
    memory: float = 80.0
    """GiB of the device."""
    reserve: float = 1.5
    """GiB of it for the CUDA context, kernels' workspaces and activations: an allowance."""
    dtype: Dtype = "bfloat16"
    """Of the weights."""
    cache_dtype: Dtype | None = None
    """Of keys and values; by default that of the weights."""
    bandwidth: float | None = None
    """GB/s (10⁹ bytes) that the device reads from its memory; None to leave times out."""
    tflops: float | None = None
    """TFLOP/s of its matrix products in that dtype."""

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise RunError(f"{name}={value!r}: expected a whole number, 1 or more.")
        if not 0 <= self.reserve < self.memory < math.inf:
            raise RunError(
                f"memory={self.memory}, reserve={self.reserve}: expected GiB of the device, above "
                "0, and the part of it that is not ours, 0 or more and less than that."
            )
        for name in ("bandwidth", "tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RunError(f"{name}={value}: expected a number above 0.")
        for name in ("dtype", "cache_dtype"):
            value = getattr(self, name)
            if value is not None and value not in get_args(Dtype):
                raise RunError(f"{name}={value!r}: expected {', '.join(get_args(Dtype))}.")


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """Predictions for one model; bytes are of one row where nothing else is said."""

    settings: ServingSettings
    name: str
    length: int
    """Tokens of a row that are planned for."""
    window: int | None
    """Tokens that the model promises, by its config and the methods; None for any number."""
    cache: KvCache
    parameters: int
    """All of them."""
    embedding: int
    """Those of an embedding table that is not the head's too: a token reads one row of it."""
    experts: int
    """Those of all experts, of which a token uses `active`."""
    active: float
    """Share of the experts that a token uses; 1 without experts."""
    head: int
    """Those of the head, which a prompt uses for its last token alone."""
    attention: tuple[tuple[int, int | None], ...]
    """Of each layer, numbers of all query heads' keys and values, and the tokens that are seen."""
    kv_heads: int | None
    """None for latent attention, whose heads share what is kept."""

    @property
    def weight_bytes(self) -> int:
        """Of all weights."""
        return self.parameters * _BYTES[self.settings.dtype]

    def cache_bytes(self, tokens: int) -> int:
        """Of the cache after so many tokens."""
        return self.cache.numbers(tokens) * self._cache_size

    @property
    def _cache_size(self) -> int:
        return _BYTES[self.settings.cache_dtype or self.settings.dtype]

    def total_bytes(self, tokens: int, batch: int) -> int:
        """Of weights and all rows' caches."""
        return self.weight_bytes + batch * self.cache_bytes(tokens)

    @property
    def fits(self) -> bool:
        """Whether weights, caches and the reserve fit."""
        return self.total_bytes(self.length, self.settings.batch_size) <= self._room

    @property
    def _room(self) -> float:
        return (self.settings.memory - self.settings.reserve) * GIB

    def longest(self, batch: int) -> float:
        """Tokens of a row that fit beside others of that length; inf where the cache is bounded."""
        if self.total_bytes(1, batch) > self._room:
            return 0
        if self.total_bytes(2**50, batch) <= self._room:
            return math.inf
        low, high = 1, 2**50
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if self.total_bytes(middle, batch) <= self._room else (low, middle)
            )
        return low

    def step_bytes(self, tokens: int, batch: int = 1) -> int:
        """Read from memory for the next token of each row: weights once, each row's cache."""
        used = min(1.0, batch * self.active)
        weights = self.parameters - self.embedding - round(self.experts * (1 - used))
        cache = batch * self.cache.read(tokens) * self._cache_size
        return weights * _BYTES[self.settings.dtype] + cache

    def tokens_per_second(self, tokens: int, batch: int = 1) -> float:
        """Of all rows together, at most, by the bandwidth.

        Raises:
            RunError: no bandwidth was given.
        """
        if self.settings.bandwidth is None:
            raise RunError("tokens per second follow from a bandwidth (--bandwidth, --measure).")
        return batch * self.settings.bandwidth * 1e9 / self.step_bytes(tokens, batch)

    def prefill_flops(self, tokens: int) -> float:
        """Of a prompt of so many tokens: two for each weight and token, and the attention's."""
        used = self.parameters - self.embedding - self.head - self.experts * (1 - self.active)
        total = 2.0 * (used * tokens + self.head)
        for width, window in self.attention:
            seen = tokens if window is None else min(window, tokens)
            pairs = seen * (seen + 1) / 2 + (tokens - seen) * seen
            total += 2.0 * width * pairs
        return total

    def time_to_first_token(self, tokens: int, batch: int = 1) -> float:
        """Seconds, at least, by the TFLOP/s.

        Raises:
            RunError: no TFLOP/s were given.
        """
        if self.settings.tflops is None:
            raise RunError("the time of a prompt follows from TFLOP/s (--tflops, --measure).")
        return batch * self.prefill_flops(tokens) / (self.settings.tflops * 1e12)

    def __str__(self) -> str:
        s = self.settings
        rows = f"{s.batch_size} row{'s' if s.batch_size > 1 else ''} of {self.length:,} tokens"
        total = self.total_bytes(self.length, s.batch_size) / GIB
        verdict = "fit" if self.fits else "do not fit"
        return (
            f"Weights {self.weight_bytes / GIB:.2f} GiB ({s.dtype}), {rows} "
            f"{total - self.weight_bytes / GIB:.2f} GiB of cache "
            f"({s.cache_dtype or s.dtype}): {total:.2f} GiB and {s.reserve:g} in reserve {verdict} "
            f"in {s.memory:g}."
        )

    def table(self, label: str) -> Table:
        """Lengths and speeds by rows at once, for rich."""
        s = self.settings
        table = Table(label, box=None, padding=(0, 2, 0, 0))
        for column in ("cache GiB", "longest", "read GB / step", "tokens/s ≤", "first token s ≥"):
            table.add_column(column, justify="right")
        for batch in sorted({*_ROWS, s.batch_size}):
            longest = self.longest(batch)
            timed = s.bandwidth is not None, s.tflops is not None
            table.add_row(
                f"{batch:,}",
                f"{batch * self.cache_bytes(self.length) / GIB:.3g}",
                "any" if longest == math.inf else f"{longest:,}",
                f"{self.step_bytes(self.length, batch) / 1e9:.3g}",
                f"{self.tokens_per_second(self.length, batch):,.0f}" if timed[0] else "",
                f"{self.time_to_first_token(self.length, batch):.3g}" if timed[1] else "",
            )
        return table

    def heads_table(self, source: PreTrainedConfig) -> Table | None:
        """The cache by key/value heads, as `longctx convert --to multi_query:N` makes it."""
        heads = self.kv_heads
        if heads is None or heads == 1:
            return None
        table = Table("kv heads", box=None, padding=(0, 2, 0, 0))
        for column in ("bytes / token", "cache GiB", f"longest at {self.settings.batch_size}"):
            table.add_column(column, justify="right")
        for count in [n for n in range(heads, 0, -1) if heads % n == 0]:
            config = copy.deepcopy(source)
            config.get_text_config(decoder=True).num_key_value_heads = count
            one = plan_serving(config, self.settings)
            longest = one.longest(self.settings.batch_size)
            table.add_row(
                f"{count} (as it is)" if count == heads else f"{count}",
                f"{one.cache.growth * one._cache_size:,}",
                f"{self.settings.batch_size * one.cache_bytes(self.length) / GIB:.3g}",
                "any" if longest == math.inf else f"{longest:,}",
            )
        return table


def plan_serving(
    source: str | os.PathLike[str] | PreTrainedConfig, settings: ServingSettings
) -> ServingPlan:
    """Predict.

    Args:
        source: a config, or what `longctx.load` takes, of which only the config is read.
        settings: what is served on what.

    Raises:
        ModelError: a model whose cache is not known.
        RunError: settings that do not go together.
        MethodError: no such method, or one that such a window does not allow.
    """
    config = source if isinstance(source, PreTrainedConfig) else read_config(source)
    text: Any = config.get_text_config(decoder=True)
    cache = KvCache.of(config)
    window: int | None = getattr(text, "max_position_embeddings", None)
    methods = parse_methods(settings.method)
    for method in methods:
        if (below := window or settings.max_length) is not None:
            most = method.cache_tokens(below)
            cache = cache if most is None else cache.bounded(most)
            window = window and _extended(text, window, method)
    length = settings.max_length or window
    if length is None:
        raise RunError(f"model type {text.model_type!r} names no window: pass --max-length.")
    model: Any = on_meta(config)
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
    own = {id(p): p.numel() for p in model.parameters()}
    embedding, head = (
        getattr(f(), "weight", None)
        for f in (model.get_input_embeddings, model.get_output_embeddings)
    )
    if embedding is None or head is None:
        raise ModelError(f"model type {text.model_type!r} has no embedding and head to count.")
    tied = head is embedding or bool(text.tie_word_embeddings)
    total = sum(own.values()) - (head.numel() if tied and head is not embedding else 0)
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    count = next((n for k in _EXPERTS if (n := getattr(text, k, None))), 0)
    heads = int(text.num_attention_heads)
    dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    latent = getattr(text, "kv_lora_rank", None)
    width = 2 * heads * dim
    if latent:
        width = heads * (
            int(text.qk_nope_head_dim) + int(text.qk_rope_head_dim) + int(text.v_head_dim)
        )
    return ServingPlan(
        settings,
        name=str(source) if not isinstance(source, PreTrainedConfig) else text.model_type,
        length=length,
        window=None if any(method.unbounded for method in methods) else window,
        cache=cache,
        parameters=total,
        embedding=0 if tied else embedding.numel(),
        experts=experts,
        active=text.num_experts_per_tok / count if experts and count else 1.0,
        head=head.numel(),
        attention=tuple((width, layer.most or layer.window) for layer in cache.layers),
        kv_heads=None if latent else int(getattr(text, "num_key_value_heads", None) or heads),
    )


def _extended(text: PreTrainedConfig, window: int, method: Method) -> int:
    """Tokens that a model of this window promises under a method on top of what is there."""
    factor, target = (getattr(method, name, None) for name in ("factor", "target"))
    if target is not None or factor is None:
        return target or window
    if "rotary" in method.slots:  # a factor of frequencies takes the place of the config's own
        window = original_length(text, rope_entry(text)[0])
    return int(window * factor + 1e-9)


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names of the number of experts in configs."""
