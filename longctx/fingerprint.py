"""Short names for what a result depends on, by content: the same on any device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .attention.hook import ATTRIBUTE
from .errors import ModelError
from .model import attention_modules, rotary_of
from .prompts.rendering import templates

__all__ = ["effect_digest", "identity_of", "json_digest", "model_digest", "tokenizer_digest"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VOLATILE = ("_name_or_path", "transformers_version", "architectures")


def json_digest(value: Any) -> str:
    """Digest of a JSON-able value; whatever JSON has no form for goes in as its text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def identity_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What a file of results belongs to: other results are of another model, or run otherwise."""
    return {
        "model": model_digest(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "chat template": json_digest(templates(tokenizer)),
        "attention implementation": str(getattr(model.config, "_attn_implementation", None)),
    }


def model_digest(model: PreTrainedModel) -> str:
    """Digest of configuration, of all that a checkpoint holds, and of the rotary as it is.

    A patch in place shows in it, and so does a rotary that was changed by hand.

    Raises:
        ModelError: weights that were never loaded.
    """
    config: dict[str, Any] = model.config.to_dict()
    found = hashlib.sha256(
        json_digest({k: v for k, v in config.items() if k not in _VOLATILE}).encode()
    )
    offloaded = _offloaded(model)
    kept = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
    for name, weight in [*model.named_parameters(), *buffers]:  # quantised weights are buffers
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.is_meta and name not in offloaded:
            raise ModelError(f"{name} has no values (it is on the meta device): load its weights.")
        found.update(_sums((offloaded[name]() if weight.is_meta else weight).detach()))
    found.update(effect_digest(model).encode())
    return found.hexdigest()[:24]


def _offloaded(model: PreTrainedModel) -> dict[str, Callable[[], Tensor]]:
    """How to read the weights that accelerate keeps elsewhere under a `device_map`."""
    found: dict[str, Callable[[], Tensor]] = {}
    for prefix, module in model.named_modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            kept: Any = getattr(one, "weights_map", None)
            if kept is None:
                continue
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, weight in own:
                if weight.is_meta:
                    found[f"{prefix}.{name}"] = partial(kept.__getitem__, name)
    return found


def _sums(weight: Tensor) -> bytes:
    """Sums of the bits along rows and columns: whole numbers, the same on every device."""
    bits = weight.contiguous().view(_BITS[weight.element_size()])
    table = bits.view(-1, bits.shape[-1]) if bits.ndim > 1 else bits.view(1, -1)
    sums = [table.sum(axis, dtype=torch.int64).cpu().numpy().tobytes() for axis in (0, 1)]
    return b"".join(sums)


def effect_digest(model: PreTrainedModel) -> str:
    """Digest of rotary and attention as a method has put them: another formula gives another."""
    try:
        rotary = rotary_of(model)
        modules = [module for _, module, _ in attention_modules(model)]
        rules = [(_rule(module), getattr(module, "scaling", None)) for module in modules]
    except ModelError:  # nothing that a method could reach
        return ""
    buffers = [(name, buffer.double().tolist()) for name, buffer in rotary.named_buffers()]
    scaling = vars(rotary).get("attention_scaling")  # its own: a wrapper passes on what it wraps
    return json_digest([type(rotary).__name__, buffers, scaling, rules])


def _rule(module: nn.Module) -> str | None:
    """The rule on an attention module, with all its settings: its `str` is for people."""
    rule = getattr(module, ATTRIBUTE, None)
    return None if rule is None else repr(rule)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of vocabulary, rules and special tokens; the chat template is another thing."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
    # The last call's padding and truncation stay in a fast tokenizer and are not part of it.
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return json_digest([rules, tokenizer.special_tokens_map])
