"""What a config.json says of windows and rotary scaling: figures that cannot be, and doubtful ones.

These read the JSON as it is, without transformers, for `doctor` and `load` alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

__all__ = [
    "CONVERSION",
    "TEXT_PARTS",
    "WINDOW_KEYS",
    "Doubt",
    "doubtful",
    "impossible",
    "is_number",
    "lower_windows",
    "rope_entries",
    "text_part",
    "window_of",
]

CONVERSION = "longctx_conversion"
"""The entry of a config that says which conversion `load` has to restore."""
Doubt = tuple[str, str, str]
"""The key, what is wrong with it, and what to write instead."""
WINDOW_KEYS = (
    "max_sequence_length",
    "max_seq_length",
    "max_seq_len",
    "seq_length",
    "seq_len",
    "n_positions",
    "n_ctx",
    "max_target_positions",
    "model_max_length",
)
"""Further keys of a config.json that name a window; servers take the smallest of all."""
_SIZES = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "head_dim": 100_000,
    "hidden_size": 10_000_000,
    "intermediate_size": 10_000_000,
    "vocab_size": 100_000_000,
    "num_labels": 1_000_000,
    "num_experts": 100_000,
    "num_local_experts": 100_000,
    "n_routed_experts": 100_000,
}
"""The largest that anyone may mean: above it building the model alone takes all memory."""
_LONGEST = 10**12
"""Tokens of a window, likewise."""
_POSITIVE = (
    *("rope_theta", "attention_factor", "partial_rotary_factor"),
    *("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"),
)
"""Entries of RoPE settings that are numbers above zero."""
TEXT_PARTS = ("text_config", "llm_config", "language_config")
"""Keys under which a multimodal config keeps that of its text model."""


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the text model, also inside a multimodal config."""
    for key in TEXT_PARTS:
        if isinstance(config.get(key), dict):
            return dict(config[key])
    return dict(config)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of JSON is a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return number and math.isfinite(value) and value > 0
    except OverflowError:  # an integer that no float holds
        return False


def window_of(text: Mapping[str, Any]) -> float | None:
    """`max_position_embeddings` where it is a number of tokens, else None."""
    length = text.get("max_position_embeddings")
    return length if is_number(length) else None


def rope_entries(text: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The RoPE settings by the key they stand under; one per layer type where they are nested."""
    for key in ("rope_parameters", "rope_scaling"):
        parameters = text.get(key)
        if isinstance(parameters, dict) and parameters:
            values: list[Any] = list(parameters.values())
            if all(isinstance(value, dict) for value in values):
                return {f"{key}.{kind}": dict(value) for kind, value in parameters.items()}
            return {key: dict(parameters)}
    return {}


def impossible(text: Mapping[str, Any]) -> Iterator[Doubt]:
    """Windows, factors and bases that are not numbers or not above zero, and absurd sizes."""
    for key, most in _SIZES.items():
        size = text.get(key)
        if isinstance(size, int | float) and not 0 < size <= most:
            yield key, f"it is {_shown(size)}", f"a number from 1 to {most:,}"
    tokens = f"a number of tokens from 1 to {_LONGEST:,}"
    for key in ("max_position_embeddings", "original_max_position_embeddings"):
        value = text.get(key)
        if value is not None and not (is_number(value) and value <= _LONGEST):
            yield key, f"it is {_shown(value)}, which is no window", tokens
    if text.get("rope_theta") is not None and not is_number(text["rope_theta"]):
        yield "rope_theta", f"it is {_shown(text['rope_theta'])}, which is no base", "a number > 0"
    for key in ("rope_parameters", "rope_scaling"):
        if text.get(key) is not None and not isinstance(text[key], dict):
            yield key, f"it is {_shown(text[key])}", "a JSON object"
    for where, entry in rope_entries(text).items():
        kind = entry.get("rope_type", entry.get("type", "default"))
        needs_factor = kind in ("linear", "dynamic", "yarn", "llama3")
        if "factor" in entry or needs_factor:
            factor = entry.get("factor")
            optional = factor is None and not needs_factor
            if not optional and not (is_number(factor) and factor >= 1):
                yield where, f"{str(kind)[:20]} with factor {_shown(factor)}", "a number ≥ 1"
        original = entry.get("original_max_position_embeddings")
        if original is not None and not is_number(original):
            yield where, f"original window {_shown(original)}", "a number of tokens > 0"
        for key in _POSITIVE:
            if entry.get(key) is not None and not is_number(entry[key]):
                yield where, f"{key} {_shown(entry[key])}", "a number > 0"
        share = entry.get("partial_rotary_factor")
        if is_number(share) and share > 1:
            yield where, f"partial_rotary_factor {_shown(share)}", "a share of at most 1"
        low, high = entry.get("low_freq_factor"), entry.get("high_freq_factor")
        if is_number(low) and is_number(high) and low >= high:
            yield (
                where,
                f"low_freq_factor {_shown(low)}, high_freq_factor {_shown(high)}",
                "the first below the second",
            )
        for key in ("short_factor", "long_factor"):
            divisors = entry.get(key)
            if divisors is not None and not (
                isinstance(divisors, list) and divisors and all(map(is_number, divisors))
            ):
                yield where, f"{key} {_shown(divisors)}", "a list of numbers > 0"


def doubtful(config: Mapping[str, Any]) -> Iterator[Doubt]:
    """Settings that software reads in different ways, or not at all."""
    text = text_part(config)
    ratio = text.get("rope_condense_ratio")
    if ratio is not None and ratio != 1:
        yield (
            "rope_condense_ratio",
            f"positions were condensed by {_shown(ratio)} (LongChat), which transformers does not "
            "do: the model is read with positions as they are",
            f'"rope_scaling": {{"rope_type": "linear", "factor": {_shown(ratio)}}} in its stead',
        )
    for where, entry in rope_entries(text).items():
        old, new = entry.get("type"), entry.get("rope_type")
        if old is not None and new is not None and old != new:
            yield (
                where,
                f"type {_shown(old)} against rope_type {_shown(new)}, which transformers takes; "
                "older software takes the former",
                "make both say the same, or leave type out",
            )
        if (new if new is not None else old) == "linear" and not config.get("longctx"):
            yield from _linear(where, entry, text)


def _linear(where: str, entry: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[Doubt]:
    factor, length = entry.get("factor"), window_of(text)
    original = entry.get("original_max_position_embeddings")
    if length is None or not (is_number(factor) and factor > 1):
        return
    if original is None:
        yield (
            where,
            f"linear by {factor:g} and max_position_embeddings {length:g}, of which nothing says "
            f"whether it is scaled yet: longctx takes it so, of an original window of "
            f"{length / factor:g}; vLLM multiplies it to {length * factor:g}",
            'add "original_max_position_embeddings": the window before scaling',
        )
    elif is_number(original) and round(length / original, 6) != round(factor, 6):
        unscaled = " (unscaled)" if length == original else ""
        yield (
            where,
            f"linear by {factor:g} of an original window of {original:g}, but "
            f"max_position_embeddings {length:g}{unscaled}",
            f'"max_position_embeddings": {original * factor:g}',
        )


def lower_windows(settings: Mapping[str, Any], keys: tuple[str, ...], length: float) -> list[str]:
    """Those keys whose figure is below a window of `length` tokens."""
    return [key for key in keys if is_number(settings.get(key)) and settings[key] < length]


def _shown(value: Any) -> str:
    """A value of JSON, short."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
