"""What each engine does with a checkpoint: one table of statements, read by all that speak of it.

`longctx.save`, `longctx doctor --engine`, `longctx serve-flags` and the documentation take their
sentences from here. A checkpoint is known by what its config.json says (no weights are read), and
every "reads it" was measured: `python -m benchmarks.engines` measures again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..config_windows import CONVERSION, is_number, rope_entries, text_part, window_of

__all__ = [
    "ENGINES",
    "Change",
    "Checkpoint",
    "Engine",
    "Reading",
    "checkpoint_of",
    "reading",
    "readings",
]

Engine = Literal["transformers", "vllm", "sglang", "llama.cpp", "mlx-lm", "ctranslate2"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
Change = Literal[
    "none", "linear", "yarn", "yarn_own", "llama3", "longrope", "longrope_own", "standing",
    "proportional", "dynamic", "biases", "beyond", "unknown",
]  # fmt: skip
"""What a config says is done to positions: `yarn_own` is YaRN with a temperature or betas of its
own, `longrope_own` longrope with another temperature than that of Phi-3, `standing` longrope with
planes that stand still, `biases` ALiBi, `beyond` whatever changes
distances, hides keys or scales queries, `unknown` a rope_type that is not one of these."""
Does = Literal["reads", "needs", "refused", "unmeasured"]
"""The engine gives our numbers; does so with what `serve-flags` prints; does not; nobody looked."""
_SLIDING = "sliding_attention"
_FAR = 1e6
"""A divisor of a frequency above this is a plane that stands still."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an engine does with a checkpoint."""

    engine: Engine
    does: Does
    says: str
    """In a sentence, without the engine's name in front."""

    def __str__(self) -> str:
        return f"{self.engine}: {self.says}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """As much of a config.json as decides how it is served."""

    model_type: str
    change: Change
    window: int
    """Tokens that it promises, the extended window."""
    original: int
    """Tokens before it was extended."""
    rope: Mapping[str, Any]
    """The RoPE settings of its full-attention layers."""
    methods: tuple[str, ...] = ()
    """Names from its record; empty where longctx did not extend it."""
    windows: bool = False
    """Whether layers slide in a family in which the conversion `sliding_window` lets them."""
    by_code: bool = False
    """Whether a module beside it (`save(…, remote_code=True)`) puts the methods in place."""


_PLUGIN = "reads it by longctx's plugin for LLaMA-like models"
_UNEXTENDED = "has no way to compute it from a config"
_SILENT = "loads it without a word and computes the unextended model"
_GROWS = (
    "reads a prompt in one pass, but generates with a base that grows while cached keys keep the "
    "former one"
)
_OWN_TEMPERATURE = "loads it without a word and computes it with a temperature of its own"
_NO_YARN = "converts no YaRN, and says so"
_NO_LONGROPE = "converts it to a model that it does not load"
_TABLE: dict[Change, dict[Engine, tuple[Does, str]]] = {
    "none": {
        "transformers": ("reads", "reads it"),
        "vllm": ("reads", "reads it"),
        "sglang": ("unmeasured", "should read it; not measured"),
        "llama.cpp": ("needs", "reads it as GGUF"),
        "mlx-lm": ("reads", "reads it"),
        "ctranslate2": ("needs", "reads it as its converter writes it"),
    },
    "linear": {
        "transformers": ("reads", "reads it"),
        "vllm": ("needs", "reads it, and multiplies the window by the factor unless told"),
        "sglang": ("unmeasured", "should read it, with the window named; not measured"),
        "llama.cpp": ("needs", "reads it as GGUF"),
        "mlx-lm": ("reads", "reads it"),
        "ctranslate2": ("needs", "reads it as its converter writes it"),
    },
    "yarn": {
        "transformers": ("reads", "reads it"),
        "vllm": ("reads", "reads it"),
        "sglang": ("unmeasured", "should read it; not measured"),
        "llama.cpp": ("needs", "reads it as GGUF"),
        "mlx-lm": ("reads", "reads it"),
        "ctranslate2": ("refused", _NO_YARN),
    },
    "yarn_own": {
        "transformers": ("reads", "reads it"),
        "vllm": ("reads", "reads it"),
        "sglang": ("unmeasured", "should read its temperature by mscale; not measured"),
        "llama.cpp": ("needs", "reads it as longctx exports it; its own converter loses it"),
        "mlx-lm": ("reads", "reads it"),
        "ctranslate2": ("refused", _NO_YARN),
    },
    "llama3": {
        "transformers": ("reads", "reads it"),
        "vllm": ("reads", "reads it"),
        "sglang": ("unmeasured", "should read it; not measured"),
        "llama.cpp": ("needs", "reads it as GGUF"),
        "mlx-lm": ("reads", "reads it"),
        "ctranslate2": ("refused", _SILENT),
    },
    "longrope": {
        "transformers": ("reads", "reads it"),
        "vllm": ("reads", "reads it"),
        "sglang": ("unmeasured", "may scale a batch by its longest request; not measured"),
        "llama.cpp": ("needs", "reads it as longctx exports it; its own converter loses it"),
        "mlx-lm": ("reads", "reads it"),
        "ctranslate2": ("refused", _NO_LONGROPE),
    },
    "longrope_own": {
        "transformers": ("reads", "reads it"),
        "vllm": ("reads", "reads it"),
        "sglang": ("unmeasured", "may scale a batch by its longest request; not measured"),
        "llama.cpp": ("needs", "reads it as longctx exports it; its own converter loses it"),
        "mlx-lm": ("refused", _OWN_TEMPERATURE),
        "ctranslate2": ("refused", _NO_LONGROPE),
    },
    "standing": {
        "transformers": ("reads", "reads it, in float32 or bfloat16"),
        "vllm": ("reads", "reads it, in float32 or bfloat16"),
        "sglang": ("unmeasured", "not measured"),
        "llama.cpp": ("needs", "reads it as longctx exports it; its own converter loses it"),
        "mlx-lm": ("refused", _OWN_TEMPERATURE),
        "ctranslate2": ("refused", _NO_LONGROPE),
    },
    "proportional": {
        "transformers": ("reads", "reads it"),
        "vllm": ("reads", "reads it"),
        "sglang": ("refused", "has no rope_type proportional for this model"),
        "llama.cpp": ("needs", "reads it as longctx exports it; its own converter loses it"),
        "mlx-lm": ("reads", "reads it"),
        "ctranslate2": ("refused", "converts no proportional scaling, and says so"),
    },
    "dynamic": {
        "transformers": ("refused", _GROWS),
        "vllm": ("needs", "reads it with one base for the whole window, by overrides alone"),
        "sglang": ("refused", "has one base for the original window; nothing was measured"),
        "llama.cpp": ("refused", "has one frequency for each plane, whatever the length"),
        "mlx-lm": ("refused", _GROWS),
        "ctranslate2": ("refused", "converts no dynamic scaling, and says so"),
    },
    "biases": {
        "transformers": ("refused", _UNEXTENDED),
        "vllm": ("needs", _PLUGIN),
        "sglang": ("refused", _UNEXTENDED),
        "llama.cpp": ("needs", "reads it as longctx exports it (LLaMA-like models)"),
        "mlx-lm": ("refused", _SILENT),
        "ctranslate2": ("refused", _SILENT),
    },
    "beyond": {
        "transformers": ("refused", _UNEXTENDED),
        "vllm": ("refused", _UNEXTENDED),
        "sglang": ("refused", _UNEXTENDED),
        "llama.cpp": ("refused", "has no way to compute it"),
        "mlx-lm": ("refused", _SILENT),
        "ctranslate2": ("refused", _SILENT),
    },
    "unknown": {
        "transformers": ("unmeasured", "longctx does not know this rope_type; not measured"),
        "vllm": ("unmeasured", "longctx does not know this rope_type; not measured"),
        "sglang": ("unmeasured", "longctx does not know this rope_type; not measured"),
        "llama.cpp": ("refused", "longctx does not know this rope_type"),
        "mlx-lm": ("refused", "longctx does not know this rope_type"),
        "ctranslate2": ("refused", "longctx does not know this rope_type"),
    },
}


_WITH_CODE: dict[Engine, tuple[Does, str]] = {
    "transformers": ("needs", "reads it with trust_remote_code where longctx is installed"),
    "vllm": ("refused", "does not know its model type: save it without remote_code"),
    "sglang": ("refused", "does not know its model type: save it without remote_code"),
    "mlx-lm": ("refused", "does not know its model type"),
    "ctranslate2": ("refused", "does not know its model type"),
}
"""What changes where a module beside a checkpoint puts its methods in place."""

_WITH_WINDOWS: dict[Engine, tuple[Does, str]] = {
    "vllm": ("unmeasured", "may let all layers see all, or refuse it; not measured"),
    "sglang": ("unmeasured", "may let all layers see all; not measured"),
    "llama.cpp": ("refused", "is given no layers that slide: longctx does not export them"),
    "mlx-lm": ("unmeasured", "may let all layers see all; not measured"),
    "ctranslate2": ("unmeasured", "may let all layers see all; not measured"),
}
"""What changes where `windows` holds."""
_READ_WINDOWS = {("vllm", "ministral", "none")}
"""Engines, families and changes of positions of which it was measured: 4.1e-6 in vLLM 0.32."""
_WINDOWS_BY_US = ("ministral", "qwen2", "qwen3", "smollm3")
"""Families in which the conversion `sliding_window` lets layers slide."""


def reading(checkpoint: Checkpoint, engine: Engine) -> Reading:
    """What one engine does with a checkpoint."""
    if checkpoint.by_code and engine in _WITH_CODE:
        return Reading(engine, *_WITH_CODE[engine])
    does, says = _TABLE[checkpoint.change][engine]
    measured = (engine, checkpoint.model_type, checkpoint.change) in _READ_WINDOWS
    if checkpoint.windows and engine in _WITH_WINDOWS and does != "refused" and not measured:
        does, says = _WITH_WINDOWS[engine]
    return Reading(engine, does, says)


def readings(checkpoint: Checkpoint) -> tuple[Reading, ...]:
    """The same of every engine."""
    return tuple(reading(checkpoint, engine) for engine in ENGINES)


def checkpoint_of(config: Mapping[str, Any]) -> Checkpoint:
    """Read from a config.json how its positions are changed.

    Args:
        config: the JSON object, whole. Figures in it that cannot be are taken for missing.
    """
    text = text_part(config)
    entries = rope_entries(text)
    rope = next((e for k, e in entries.items() if k.endswith("full_attention")), None)
    rope = rope or next(iter(entries.values()), {})
    methods = _methods(config)
    held = int(window_of(text) or 0)
    original = _original(config, rope, held)
    window = _promised(config, held, original)
    change = _change(rope, window, original)
    beyond = _beyond(methods)
    if beyond:
        change = beyond
    if CONVERSION in config:  # weights of a class that no engine has
        change = "beyond"
    if change == "dynamic" and is_number(rope.get("factor")):
        window = max(window, round(original * float(rope["factor"])))
    family = str(text.get("model_type") or config.get("model_type"))
    kinds: Any = text.get("layer_types")
    return Checkpoint(
        family, change, window, original, rope,
        tuple(str(method.get("name")) for method in methods),
        windows=family in _WINDOWS_BY_US and isinstance(kinds, list) and _SLIDING in kinds,
        by_code=bool(methods) and config.get("model_type") == "longctx",
    )  # fmt: skip


def _methods(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    record: Any = config.get("longctx")
    methods: Any = record.get("methods") if isinstance(record, dict) else None
    return [m for m in methods if isinstance(m, dict)] if isinstance(methods, list) else []


def _original(config: Mapping[str, Any], rope: Mapping[str, Any], held: int) -> int:
    record: Any = config.get("longctx")
    before: Any = record.get("original") if isinstance(record, dict) else None
    recorded = before.get("max_position_embeddings") if isinstance(before, dict) else None
    for source in (recorded, rope.get("original_max_position_embeddings")):
        if is_number(source):
            return int(source)
    factor = rope.get("factor")
    if rope.get("rope_type", rope.get("type")) == "linear" and is_number(factor):
        return int(held / factor)
    return held


def _promised(config: Mapping[str, Any], held: int, original: int) -> int:
    """The window that the record's methods name, where that is more than the config's."""
    for method in _methods(config):
        factor, target = method.get("factor"), method.get("target")
        if is_number(target):
            held = max(held, int(target))
        elif is_number(factor):
            held = max(held, int(original * factor + 1e-9))
    return held


def _beyond(methods: list[Mapping[str, Any]]) -> Change | None:
    """Whether a method does what no config of a RoPE model can say."""
    if not methods:
        return None
    from ..registry import available, method_class  # torch takes seconds: only where it is needed

    found: Change | None = None
    for method in methods:
        name = method.get("name")
        if name not in available():
            return "unknown"
        kind = method_class(name)
        if not kind.plain_loadable:
            found = "biases" if kind.biases and found is None and len(methods) == 1 else "beyond"
    return found


def _change(rope: Mapping[str, Any], window: int, original: int) -> Change:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "yarn":
        return "yarn_own" if _own_yarn(rope) else "yarn"
    if kind == "longrope":
        long: Any = rope.get("long_factor")
        still = isinstance(long, list) and any(is_number(x) and x > _FAR for x in long)
        if still:
            return "standing"
        return "longrope_own" if _own_longrope(rope, window, original) else "longrope"
    names: dict[Any, Change] = {
        "default": "none",
        "linear": "linear",
        "llama3": "llama3",
        "proportional": "proportional",
        "dynamic": "dynamic",
    }
    return names.get(kind, "unknown") if isinstance(kind, str) else "unknown"


def _own_yarn(rope: Mapping[str, Any]) -> bool:
    """Whether temperature or betas are others than YaRN's own."""
    factor, own = rope.get("factor"), rope.get("attention_factor")
    usual = 0.1 * math.log(factor) + 1 if is_number(factor) else 1.0
    betas = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    return (is_number(own) and abs(own - usual) > 1e-6) or betas != (32, 1)


def _own_longrope(rope: Mapping[str, Any], window: int, original: int) -> bool:
    """Whether the temperature is another than √(1 + ln s / ln L), s-fold from L tokens."""
    own = rope.get("attention_factor")
    if not is_number(own):
        return False
    scale = max(1.0, window / original) if original > 1 else 1.0
    return abs(own - math.sqrt(1 + math.log(scale) / math.log(max(2, original)))) > 1e-6
