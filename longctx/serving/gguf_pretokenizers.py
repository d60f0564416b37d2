"""How text is cut before byte-level BPE, by the names in GGUF files: for reading and writing.

Source: llama.cpp's src/llama-vocab.cpp, which gives several names one expression; the steps are
those of the published tokenizers.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

__all__ = ["Pretokenizer", "cut_as_named", "pretokenizer_of"]

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _by(expression: str) -> tuple[dict[str, Any], ...]:
    pattern = {"Regex": expression}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return (split, {**_GPT2, "use_regex": False})


@dataclass(frozen=True, slots=True)
class Pretokenizer:
    """One way to cut text."""

    names: tuple[str, ...]
    """Of `tokenizer.ggml.pre`; the first is written."""
    steps: tuple[dict[str, Any], ...]
    """As tokenizer.json writes them."""
    ignore_merges: bool = False
    """Whether a piece that is a token is taken whole, whatever the merges say."""
    begins: bool = False
    """Whether a text begins with BOS where the file does not say."""


_KNOWN = (
    Pretokenizer(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling"),
        (_GPT2,),
    ),
    Pretokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        (_DIGITS, _GPT2),
    ),
    Pretokenizer(
        ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "solar-open"), _by(_QWEN)
    ),
    Pretokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _by(_LLAMA3),
        ignore_merges=True,
        begins=True,
    ),
    Pretokenizer(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), _by(_LLAMA3)),
)


def pretokenizer_of(settings: dict[str, Any]) -> Pretokenizer | None:
    """The one that a tokenizer.json says, None for one that is not known here."""
    steps = _steps(settings)
    ignores = bool(settings["model"].get("ignore_merges"))
    return next(
        (one for one in _KNOWN if [*one.steps] == steps and one.ignore_merges == ignores), None
    )


def cut_as_named(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Let a tokenizer that transformers read from a GGUF file cut text as the file names it.

    Args:
        tokenizer: changed in place.
        path: of the file.

    Warns:
        UserWarning: a name that neither longctx nor transformers knows.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    model, pre, begins = (
        fields[key].contents() if (key := f"tokenizer.ggml.{name}") in fields else None
        for name in ("model", "pre", "add_bos_token")
    )
    if model != "gpt2":
        return
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    found = next((one for one in _KNOWN if pre in one.names), None)
    if found is None:
        if _steps(json.loads(backend.to_str())) == [_GPT2]:  # nothing was chosen by the name
            warnings.warn(
                f"{path} names {pre!r} as the way to cut text (tokenizer.ggml.pre), which is not "
                "known: text is cut as GPT-2 does, and some token ids may be others than the "
                "model learnt. Put the tokenizer.json of the original into the converted folder.",
                stacklevel=2,
            )
        return
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    steps = {"type": "Sequence", "pretokenizers": [*found.steps]}
    settings = {"version": "1.0", "added_tokens": [], "model": empty, "pre_tokenizer": steps}
    backend.pre_tokenizer = Tokenizer.from_str(json.dumps(settings)).pre_tokenizer
    backend.model.ignore_merges = found.ignore_merges
    if begins is None and found.begins and tokenizer.bos_token is not None:
        tokenizer.add_bos_token = True  # pyright: ignore[reportAttributeAccessIssue]


def _steps(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json, with what ids do not depend on as it is in the table."""
    first: dict[str, Any] = settings.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = first.get("pretokenizers") or [first]
    return [
        {**_GPT2, **step, "trim_offsets": True} if step.get("type") == "ByteLevel" else step
        for step in steps
    ]
