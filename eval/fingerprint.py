"""Short names for what a result depends on, by content: the same anywhere, other after training."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["json_digest", "model_digest", "tokenizer_digest"]

_SAMPLES = 256  # values per parameter: any training moves some of them
_VOLATILE = ("_name_or_path", "transformers_version", "architectures")


def json_digest(value: Any) -> str:
    """Digest of a JSON-able value; whatever JSON has no form for goes in as its text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def model_digest(model: PreTrainedModel) -> str:
    """Digest of configuration (a patch in place included) and evenly sampled weights."""
    config: dict[str, Any] = model.config.to_dict()
    found = hashlib.sha256(
        json_digest({k: v for k, v in config.items() if k not in _VOLATILE}).encode()
    )
    for name, weight in model.named_parameters():
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if not weight.is_meta:
            flat = weight.detach().flatten()
            some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]
            found.update(some.float().cpu().numpy().tobytes())
    return found.hexdigest()[:24]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of vocabulary, rules and chat template."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
    # The last call's padding and truncation stay in a fast tokenizer and are no part of it.
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return json_digest([rules, tokenizer.special_tokens_map, tokenizer.chat_template])
