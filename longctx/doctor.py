"""Find, in a checkpoint's files, the settings that fail silently once a context is long."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .config_windows import (
    WINDOW_KEYS,
    doubtful,
    impossible,
    is_number,
    lower_windows,
    rope_entries,
    text_part,
    window_of,
)
from .errors import ModelError
from .serving.engines import Engine, checkpoint_of, reading

__all__ = ["Finding", "examine"]

_KNOWN = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "axial")
_NEEDS_ORIGINAL = ("yarn", "longrope", "llama3")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing seen in a checkpoint."""

    level: Literal["problem", "note"]
    where: str
    """File and key."""
    what: str
    """What is there and what it does."""
    mend: str
    """What to write or run instead."""


def examine(folder: Path, engine: Engine | None = None) -> list[Finding]:
    """Read a checkpoint's JSON files (no weights, no code) and return what is worth knowing.

    Args:
        folder: a checkpoint folder.
        engine: also say what this engine does with it.

    Returns:
        Problems, which change numbers silently, and notes, which only matter in some use.

    Raises:
        ModelError: no config.json, or one that is not JSON.
    """
    config = _read(folder / "config.json")
    if config is None:
        raise ModelError(f"{folder} holds no config.json: expected a checkpoint folder.")
    text = text_part(config)
    rope = _rope(text, _is_stretched(config))
    found = [*_kind(config), *rope, *_positions(text), *_record(config), *_weights(folder)]
    for doubts in (impossible(text), doubtful(config)):
        found += [
            Finding("problem", f"config.json: {key}", what, mend) for key, what, mend in doubts
        ]
    found += [*_tokenizer(folder, text), *_pinned(folder, config)]
    return found if engine is None else [*found, *_served(config, engine)]


def _served(config: dict[str, Any], engine: Engine) -> Iterator[Finding]:
    """What an engine does with the checkpoint, where that is more than reading it."""
    found = reading(checkpoint_of(config), engine)
    if found.does == "refused":
        way = "serve it by another engine (longctx serve-flags says which command)"
        yield Finding("problem", engine, found.says, way)
    elif found.does == "needs":
        way = f"longctx serve-flags MODEL --engine {engine} prints the command"
        yield Finding("note", engine, found.says, way)
    elif found.does == "unmeasured":
        way = f"longctx serve-check MODEL --url URL --engine {engine} compares it"
        yield Finding("note", engine, found.says, way)


def _kind(config: dict[str, Any]) -> Iterator[Finding]:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        yield Finding(
            "problem",
            "config.json: model_type",
            f"it is {kind!r}: nothing can tell which model this is, and no library loads it",
            'fetch config.json again, or write the type it had, such as "llama"',
        )


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    if not path.is_file():
        raise ModelError(f"{path} is not a regular file: fetch it again.")
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}): fetch the file again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {str(value)[:40]!r}, no JSON object: fetch the file again.")
    return value


def _is_stretched(config: dict[str, Any]) -> bool:
    """Whether a method that no config can say has set the window, beside the rotary settings."""
    record = config.get("longctx")
    methods: Any = record.get("methods") if isinstance(record, dict) else None
    if not isinstance(methods, list):
        return False
    from .registry import available, method_class  # torch takes seconds: only where it is needed

    names = [method.get("name") for method in methods if isinstance(method, dict)]
    return any(name in available() and not method_class(name).plain_loadable for name in names)


def _rope(text: dict[str, Any], stretched: bool) -> Iterator[Finding]:
    legacy, present = text.get("rope_scaling"), text.get("rope_parameters")
    if legacy and present and legacy != present:
        yield Finding(
            "problem",
            "config.json: rope_scaling",
            "says otherwise than rope_parameters, and transformers takes it instead",
            "make both say the same, or remove rope_scaling",
        )
    for key, entry in rope_entries(text).items():
        where = f"config.json: {key}"
        kind = entry.get("rope_type", entry.get("type", "default"))
        yield from _rope_type(where, kind)
        if "rope_theta" not in entry and "rope_theta" not in text:
            yield Finding(
                "problem",
                where,
                "no rope_theta: the base falls back to the class default "
                "(usually 10000), whatever the model was trained with",
                'add "rope_theta" beside rope_type',
            )
        original = entry.get("original_max_position_embeddings")
        if original is None:
            original = text.get("original_max_position_embeddings")
        if kind in _NEEDS_ORIGINAL and original is None:
            yield Finding(
                "problem",
                where,
                f"{kind} without original_max_position_embeddings: it is taken "
                "to be max_position_embeddings, which makes most frequencies wrong",
                'add "original_max_position_embeddings": the window before extending',
            )
        length = window_of(text)
        yield from _window(where, kind, entry, length, original)
        if not stretched:
            yield from _ratio(where, kind, entry, length, original)
        if kind == "longrope":
            yield from _longrope(where, entry)
        if "truncate" in entry and "." in key:
            yield Finding(
                "problem",
                where,
                "truncate inside a per-layer-type entry is ignored by "
                "transformers (it reads the top level)",
                "leave it out, or compute with truncate on",
            )


def _rope_type(where: str, kind: Any) -> Iterator[Finding]:
    if kind in _KNOWN:
        return
    if kind == "su":
        yield Finding(
            "problem",
            where,
            "rope_type 'su' is the old name of longrope, which few model types of transformers "
            "still take",
            '"rope_type": "longrope"',
        )
        return
    also = "; any name with 'dynamic' in it rescales by length" if "dynamic" in str(kind) else ""
    yield Finding(
        "problem",
        where,
        f"rope_type {str(kind)[:40]!r} is not one that transformers knows{also}",
        f"one of {', '.join(_KNOWN[:6])}",
    )


def _window(
    where: str, kind: Any, entry: dict[str, Any], length: float | None, original: Any
) -> Iterator[Finding]:
    factor = entry.get("factor")
    if length is None or not is_number(factor):
        return
    if kind == "dynamic" and (original is None or length == original):
        yield Finding(
            "note",
            where,
            f"dynamic leaves max_position_embeddings at {length:g}: a longer request is scaled to "
            f"its own length T, as by NTK with {factor:g}·T/{length:g} − {factor - 1:g}",
            "nothing in transformers; a server that takes max_position_embeddings for its limit "
            "must be told a longer one",
        )
    if not is_number(original):
        return
    if kind == "dynamic" and length > original:
        yield Finding(
            "problem",
            where,
            f"dynamic with max_position_embeddings {length} above the original "
            f"{original}: it scales only past the former, so it never does",
            f'"max_position_embeddings": {original}',
        )


def _ratio(
    where: str, kind: Any, entry: dict[str, Any], length: float | None, original: Any
) -> Iterator[Finding]:
    factor = entry.get("factor")
    if kind not in ("yarn", "longrope") or not is_number(factor):
        return
    if length is None or not is_number(original):
        return
    if round(length / original, 6) != round(factor, 6):
        window = original * factor
        right = f'"factor": {length / original:g}'
        if window < 1e12:
            right += f', or "max_position_embeddings": {int(window)}'
        yield Finding(
            "problem" if kind == "yarn" else "note",
            where,
            f"factor {factor} but max_position_embeddings / original is {length / original:g}: "
            "transformers scales by the factor, other servers by the ratio",
            right,
        )


def _longrope(where: str, entry: dict[str, Any]) -> Iterator[Finding]:
    short, long = entry.get("short_factor"), entry.get("long_factor")
    if short != long:
        yield Finding(
            "note",
            where,
            "short_factor and long_factor differ: keys cached before the original "
            "window is crossed do not fit the queries after it (transformers and longctx alike)",
            "begin long requests long (one prefill), or extend with longctx's static longrope",
        )
    if entry.get("attention_factor") is not None and entry.get("long_mscale") is None:
        yield Finding(
            "note",
            where,
            "attention_factor without short_mscale and long_mscale, which is what vLLM reads",
            "write all three; longctx.save does",
        )


def _positions(text: dict[str, Any]) -> Iterator[Finding]:
    where = "config.json: max_position_embeddings"
    length = window_of(text)
    if isinstance(length, float):
        yield Finding("problem", where, f"{length} is not a whole number", f"{int(length)}")
    window = text.get("sliding_window")
    if not text.get("use_sliding_window", True) or length is None:
        return
    if is_number(window) and window < length:
        yield Finding(
            "note",
            "config.json: sliding_window",
            f"sliding layers see {window} tokens back, whatever the window of {length}",
            "expected in Mistral, Ministral and Gemma; measure before use",
        )


def _record(config: dict[str, Any]) -> Iterator[Finding]:
    record = config.get("longctx")
    if not record:
        return
    methods: Any = record.get("methods") if isinstance(record, dict) else None
    methods = methods if isinstance(methods, list) else []
    names = [str(method.get("name", "")) for method in methods if isinstance(method, dict)]
    if not all(names) or not names or len(names) < len(methods) or "original" not in record:
        yield Finding(
            "problem",
            "config.json: longctx",
            f"{str(record)[:40]!r} is not a valid longctx record: longctx.load refuses it",
            "delete the entry, or extend the original checkpoint anew",
        )
        return
    from .registry import available, method_class  # torch takes seconds: only where it is needed

    unknown = [name for name in names if name not in available()]
    if unknown:
        yield Finding(
            "problem",
            "config.json: longctx",
            f"extended by {' and '.join(unknown)}, which this installation does not know: "
            "longctx.load refuses it",
            "install what the checkpoint was made with, or extend the original checkpoint anew",
        )
    elif config.get("model_type") == "longctx":
        yield Finding(
            "note",
            "config.json: longctx",
            f"extended by {' and '.join(names)}: transformers loads it with trust_remote_code=True "
            "where longctx is installed, and refuses it without; other engines do not know its "
            "model type",
            "AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True), or longctx.load",
        )
    elif not all(method_class(name).plain_loadable for name in names):
        yield Finding(
            "note",
            "config.json: longctx",
            f"extended by {' and '.join(names)}, which no "
            "transformers config can say: a plain load gives the unextended model",
            "load with longctx.load, or save it with remote_code=True (longctx extend "
            "--remote-code), which transformers refuses to load without the method",
        )


def _weights(folder: Path) -> Iterator[Finding]:
    safe, pickled = list(folder.glob("*.safetensors")), list(folder.glob("*.bin"))
    if list(folder.glob("*.gguf")):
        yield Finding(
            "note",
            "*.gguf",
            "a model loaded from GGUF refuses casts and saving",
            "`longctx convert FILE.gguf OUT` writes a plain checkpoint",
        )
    elif not safe and pickled:
        yield Finding(
            "problem",
            pickled[0].name,
            "weights only as pickles, which execute code when read; longctx refuses them",
            "ask the author for safetensors, or convert where it is safe",
        )
    elif not safe:
        yield Finding("problem", str(folder), "no weights", "fetch *.safetensors")
    if (folder / "adapter_config.json").exists():
        yield Finding(
            "problem",
            "adapter_config.json",
            "an adapter lies in the folder, which transformers puts on unasked; longctx refuses it",
            "merge it (peft's merge_and_unload), or move its files elsewhere",
        )
    if any(not _is_ours(path) for path in folder.glob("*.py")):
        yield Finding(
            "note",
            "*.py",
            "the checkpoint brings Python along",
            "it runs only with --trust-remote-code; read it first",
        )


def _is_ours(path: Path) -> bool:
    """Whether a file is the module of `longctx.save(…, remote_code=True)` as it was written."""
    if path.name != "modeling_longctx.py":
        return False
    from .remote_code import MODULE_TEXT  # transformers takes seconds

    return path.is_file() and path.read_bytes() == MODULE_TEXT.encode()


def _tokenizer(folder: Path, text: dict[str, Any]) -> Iterator[Finding]:
    where = "tokenizer_config.json"
    settings = _read(folder / where)
    if settings is None:
        yield Finding("problem", where, "no tokenizer", "save the tokenizer beside the model")
        return
    limit, length = settings.get("model_max_length"), window_of(text)
    if is_number(limit) and length is not None and limit < length:
        yield Finding(
            "problem",
            f"{where}: model_max_length",
            f"{int(limit)} is below the window of "
            f"{int(length)}: truncation=True and servers cut inputs there",
            f'"model_max_length": {int(length)}',
        )
    if settings.get("eos_token") is None:
        yield Finding(
            "note",
            f"{where}: eos_token",
            "none: generation never ends by itself and chat fine-tuning has no end token to teach",
            "set eos_token",
        )


def _pinned(folder: Path, config: dict[str, Any]) -> Iterator[Finding]:
    """Other keys and files that still name a smaller window."""
    text = text_part(config)
    length = window_of(text)
    if length is None:
        return
    tokens = f"{int(length)}"
    for place in (text, config) if text != config else (text,):
        for key in lower_windows(place, WINDOW_KEYS, length):
            yield Finding(
                "problem",
                f"config.json: {key}",
                f"{place[key]:.0f} is below the window of {tokens}: servers take the smallest",
                f'"{key}": {tokens}',
            )
    generation = _read(folder / "generation_config.json") or {}
    for key in lower_windows(generation, ("max_length",), length):
        yield Finding(
            "problem",
            f"generation_config.json: {key}",
            f"generation ends at {generation[key]:.0f} tokens with the prompt, below the window "
            f"of {tokens}",
            f'"{key}": {tokens}, or leave it out',
        )
    truncation = (_read(folder / "tokenizer.json") or {}).get("truncation")
    if isinstance(truncation, dict) and lower_windows(truncation, ("max_length",), length):
        yield Finding(
            "problem",
            "tokenizer.json: truncation",
            f"every input is cut at {truncation['max_length']:.0f} tokens, below the window of "
            f"{tokens}",
            '"truncation": null',
        )
