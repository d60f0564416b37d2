"""A tokenizer in the terms of GGUF: which of llama.cpp's own tokenizers splits text as it does.

llama.cpp keeps two algorithms that matter here. "gpt2" is byte-level BPE by a list of merges, and a
name (`tokenizer.ggml.pre`) says by which regular expression text is cut before. "llama" merges the
pair whose token has the best score, as SentencePiece does. A tokenizer is matched by its own
settings (tokenizer.json), never by its name; one that matches neither is refused.

Source: llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ModelError
from .gguf_pretokenizers import pretokenizer_of

__all__ = ["Vocabulary", "vocabulary_of"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, as GGUF numbers them."""
_SPACE = "▁"
_INSTEAD = (
    "Export it with llama.cpp's own converter, which knows more tokenizers, and hold its server "
    "against the checkpoint (longctx serve-check)."
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str
    """`tokenizer.ggml.model`: "gpt2" (byte-level BPE) or "llama" (by scores)."""
    pre: str
    """`tokenizer.ggml.pre`: how text is cut before."""
    tokens: list[str]
    """One for each embedding of the model."""
    kinds: list[int]
    """Their kinds."""
    merges: list[str] = field(default_factory=list)
    """Of "gpt2": pairs with a space between, the first to merge first."""
    scores: list[float] = field(default_factory=list)
    """Of "llama": the best is merged first."""
    space_prefix: bool | None = None
    """Of "llama": whether a space is put before the text."""
    begins: bool = False
    """Whether a text begins with BOS."""
    ends: bool = False
    """Whether a text ends with EOS."""
    special: dict[str, int] = field(default_factory=dict)
    """Ids of "bos", "eos", "unknown" and "padding", where there are such."""
    chat_template: str | None = None
    notes: tuple[str, ...] = ()
    """Where llama.cpp may split a text in another way, in words."""


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Say a tokenizer in the terms of GGUF.

    Args:
        tokenizer: of the model.
        size: embeddings of the model; tokens that the tokenizer does not have are filled up.

    Raises:
        ModelError: llama.cpp has no such tokenizer; the message says what was found.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} has no tokenizer.json, by which it could be matched. "
            f"{_INSTEAD}"
        )
    settings: dict[str, Any] = json.loads(backend.to_str())
    model: dict[str, Any] = settings["model"]
    if model["type"] != "BPE":
        raise _unmatched(f"its model is {model['type']!r}, not BPE")
    if model.get("dropout") or model.get("continuing_subword_prefix"):
        raise _unmatched("its BPE has dropout or a prefix of continued words")
    added: list[dict[str, Any]] = settings.get("added_tokens") or []
    tokens = _tokens(model, added, size)
    kinds = _kinds(tokens, model, added)
    begins, ends = _template(tokenizer)
    common: dict[str, Any] = {
        "tokens": [text or f"[PAD{index}]" for index, text in enumerate(tokens)],
        "kinds": kinds,
        "begins": begins,
        "ends": ends,
        "special": _special(tokenizer),
        "chat_template": _chat_template(tokenizer),
    }
    notes = _strip_notes(added)
    if model.get("byte_fallback"):
        return Vocabulary(
            "llama", "default", scores=_scores(model, tokens),
            space_prefix=_space_prefix(settings), notes=(*notes, *_space_notes(settings)), **common
        )  # fmt: skip
    pre = _pre(settings)
    merges = [" ".join(pair) for pair in _pairs(model)]
    if (settings.get("normalizer") or {}).get("type") == "NFC":
        notes.append("text is not brought into the form NFC")
    return Vocabulary("gpt2", pre, merges=merges, notes=tuple(notes), **common)


def _unmatched(found: str) -> ModelError:
    return ModelError(f"llama.cpp has no tokenizer like this one: {found}. {_INSTEAD}")


def _tokens(model: dict[str, Any], added: Sequence[dict[str, Any]], size: int) -> list[str | None]:
    ids: dict[str, int] = {**model["vocab"], **{one["content"]: one["id"] for one in added}}
    beyond = [text for text, index in ids.items() if index >= size]
    if beyond:
        raise ModelError(
            f"the tokenizer has {len(beyond)} tokens beyond the model's {size:,} embeddings (such "
            f"as {beyond[0]!r}): take the tokenizer that the model was trained with."
        )
    tokens: list[str | None] = [None] * size
    for text, index in ids.items():
        tokens[index] = text
    return tokens


def _kinds(
    tokens: Sequence[str | None], model: dict[str, Any], added: Sequence[dict[str, Any]]
) -> list[int]:
    special = {one["content"]: bool(one["special"]) for one in added}
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
    found: list[int] = []
    for text in tokens:
        if text is None:
            found.append(UNUSED)
        elif text == model.get("unk_token") and bytes_:
            found.append(UNKNOWN)
        elif text in special:
            found.append(CONTROL if special[text] else USER_DEFINED)
        else:
            found.append(BYTE if text in bytes_ else NORMAL)
    return found


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    return [(left, right) for left, right in pairs]


def _pre(settings: dict[str, Any]) -> str:
    """The name in llama.cpp of how text is cut before BPE."""
    normalizer = settings.get("normalizer") or {}
    if normalizer and normalizer.get("type") != "NFC":
        raise _unmatched(f"its normalizer is {_short(normalizer)}")
    found = pretokenizer_of(settings)
    if found is None:
        ignores = bool(settings["model"].get("ignore_merges"))
        cut = _short(settings.get("pre_tokenizer"))
        raise _unmatched(f"its pre-tokenizer is {cut}, with ignore_merges {ignores}")
    return found.names[0]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:157]}…"


def _scores(model: dict[str, Any], tokens: Sequence[str | None]) -> list[float]:
    """Scores by which SentencePiece's algorithm merges what these merges do, in their order.

    Raises:
        ModelError: the merges are not all those that the tokens allow, token by token, so the two
            algorithms differ.
    """
    ranks: dict[str, list[int]] = {}
    pairs = _pairs(model)
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, []).append(rank)
    known, there = set(model["vocab"]), set(pairs)
    for text, own in ranks.items():
        if own[-1] - own[0] != len(own) - 1:
            raise _unmatched(f"the merges that make {text!r} do not stand together")
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in known and right in known and (left, right) not in there:
                raise _unmatched(
                    f"{text!r} is made of other tokens too ({left!r} and {right!r}), which its "
                    "merges leave out"
                )
    last = float(len(pairs))
    return [-float(ranks[text][0]) if text in ranks else -last for text in map(str, tokens)]


def _space_prefix(settings: dict[str, Any]) -> bool:
    """Whether a space is put before the text, of the forms that "▁" for spaces is written in."""
    normalizer = settings.get("normalizer") or {}
    steps: list[dict[str, Any]] = normalizer.get("normalizers") or ([normalizer] * bool(normalizer))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    cut = settings.get("pre_tokenizer")
    if cut is None and steps in ([prepend, replace], [replace]):
        return prepend in steps
    metaspace = {"type": "Metaspace", "replacement": _SPACE, "split": False}
    if not steps and cut and metaspace.items() <= cut.items():
        return cut.get("prepend_scheme") != "never"
    raise _unmatched(f"spaces become ▁ by {_short([normalizer, cut])}")


def _space_notes(settings: dict[str, Any]) -> list[str]:
    if (settings.get("pre_tokenizer") or {}).get("prepend_scheme") == "first":
        return ["a text that begins with a space, or follows a special token, gets one more"]
    return []


def _strip_notes(added: Sequence[dict[str, Any]]) -> list[str]:
    stripping = [one["content"] for one in added if one.get("lstrip") or one.get("rstrip")]
    return [f"spaces beside {', '.join(stripping[:3])} are kept"] if stripping else []


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether BOS and EOS are put around a text, found by trying.

    Raises:
        ModelError: something else is put around it.
    """
    plain: list[int] = tokenizer("a b", add_special_tokens=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    whole: list[int] = tokenizer("a b")["input_ids"]  # pyright: ignore[reportAssignmentType]
    for begins in (False, True):
        for ends in (False, True):
            bos = [tokenizer.bos_token_id] if begins else []
            eos = [tokenizer.eos_token_id] if ends else []
            if whole == [*bos, *plain, *eos]:
                return begins, ends
    raise _unmatched(f"around a text it puts {[i for i in whole if i not in plain]}")


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return {name: int(index) for name, index in ids.items() if isinstance(index, int)}


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template: Any = tokenizer.chat_template
    return template if isinstance(template, str) else None
