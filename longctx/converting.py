"""The call that makes another model: `convert`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicSlidingWindowLayer

from .attention.layers import attention_in_use
from .attention.state_cache import StateLayer
from .conversion import Calibration, Conversion, ConversionReport, Converted, recorded
from .errors import DataError, MethodError, ModelError
from .model import evaluating, text_config, unwrapped, window
from .patch import Check, Method, patch_of
from .prompts.assembly import Prompt
from .prompts.haystacks import Texts, bos_of, encode, held_in
from .prompts.passkey_prompts import SHORT, passkey
from .registry import make_conversion, parse_conversion

__all__ = ["convert", "logits_differ"]

_TOKENS = 4_096
"""Tokens of text that are read to calibrate."""
_ROW = 512
"""Tokens of a row of them, or the window where that is shorter."""
_PROMPTS = 8
"""Prompts at least that ask for keys."""
_PROOF = 48
_CACHED = 32
"""Of those, the tokens that are read before the others go on from the cache."""
_EXACT, _HALF = 2e-5, 5e-2
"""Largest difference of logits that counts as none, relative to the largest of them; the second
for weights of 16 bits, which are rounded anew."""


def convert(
    model: nn.Module,
    method: Conversion | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Tensor | Texts | None = None,
    **fields: Any,
) -> Converted:
    """Make a new model out of the weights of `model`, which stays as it is.

    Args:
        model: a transformers decoder without a patch, in float32 for the full precision.
        method: an instance (`MultiQuery(kv_heads=1)`), a name with its fields as keywords, or as
            the command line writes it ("multi_query:1").
        tokenizer: turns the calibration text into tokens; of methods that read any.
        calibration: what those read: texts, or token ids, int64 [rows, tokens]. By default 133
            documents of Python's manual, none of them in the text that is measured on.
        **fields: the method's own fields, with a name only.

    Returns:
        The new model and a report of what is exact. There is no undo.

    Raises:
        MethodError: an unknown method or setting, a model with a method on it, no calibration.
        ModelError: a family without the structure that the method needs, quantised weights.
        DataError: calibration that is too short or of other tokens than the model's.
    """
    model = unwrapped(model)
    method = _resolve(method, fields)
    _refuse(model, method)
    read = _calibration(model, method, tokenizer, calibration)
    with evaluating(model), torch.no_grad():
        made, found = method.convert(model, read)
        made.generation_config = copy.deepcopy(model.generation_config)
        made.name_or_path = model.name_or_path  # `save` keeps away from the original's folder
        if method.plain_loadable:
            made.set_attn_implementation(attention_in_use(model) or "sdpa")
        off = logits_differ(made, model, tokens=_proof_tokens(made, method))
        checks = [*found, *_checks(made, method, off)]
        if method.same_within:
            near = logits_differ(made, model, tokens=method.same_within)
            detail = f"in the first {method.same_within}, to {near:.1e} of the largest logit"
            checks.append(Check("logits of the original", near <= _tolerance(made), detail))
    failed = [check for check in checks if not check.ok]
    if failed:
        raise ModelError(
            f"{method.name} does not serve model type {model.config.model_type!r}: "
            + "; ".join(f"{c.name} ({c.detail})" for c in failed)
        )
    sizes = [sum(p.numel() for p in one.parameters()) for one in (model, made)]
    caches = [_cache_bytes(one) for one in (model, made)]
    report = ConversionReport(
        method,
        off <= _tolerance(made) and not method.same_within,
        (sizes[0], sizes[1]),
        (caches[0][0], caches[1][0]),
        (caches[0][1], caches[1][1]),
        tuple(checks),
    )
    return Converted(made, method, report)


def logits_differ(one: PreTrainedModel, other: PreTrainedModel, *, tokens: int = _PROOF) -> float:
    """Largest difference of the last logits of so many tokens, relative to the largest.

    The last ones depend on all before them, and all of them take gibibytes.
    """
    ids = _ids(other, tokens)
    found, wanted = (_last_logits(model, ids) for model in (one, other))
    return float((found - wanted).abs().max() / wanted.abs().max())


def _tolerance(model: PreTrainedModel) -> float:
    return _EXACT if next(model.parameters()).dtype.itemsize >= 4 else _HALF


def _resolve(method: Conversion | str, fields: dict[str, Any]) -> Conversion:
    if isinstance(method, str):
        if ":" not in method:
            return make_conversion(method, fields)
        if fields:
            raise MethodError(f"pass fields inside {method!r} or as keywords, not both.")
        return parse_conversion(method)
    if fields:
        raise MethodError(f"{method!r} is complete: set {', '.join(fields)} on it instead.")
    slots: tuple[str, ...] = getattr(method, "slots", ())
    if isinstance(method, type) or slots != ("weights",):
        way = " `longctx.extend` puts that one on." if isinstance(method, Method) else ""
        raise MethodError(
            f"expected a conversion such as MultiQuery(kv_heads=1), or a name, got {method!r}.{way}"
        )
    return method


def _refuse(model: PreTrainedModel, method: Conversion) -> None:
    """Refuse models that are not a family's own weights, as they were loaded."""
    patch = patch_of(model)
    if patch is not None or getattr(model.config, "longctx", None) is not None:
        name = patch.method.name if patch is not None else "a method"
        raise MethodError(
            f"{name} is on this model: call longctx.patch_of(model).remove(), convert it by "
            f"{method.name}, then extend what comes of it."
        )
    if recorded(model) is not None:
        raise MethodError(
            f"this model was made by {recorded(model)}: convert its original by {method.name} "
            "instead."
        )
    if any("base_layer" in module._modules for module in model.modules()):  # pyright: ignore[reportPrivateUsage]
        raise ModelError("the model has adapters (PEFT) on it: merge them first.")
    spread: Any = getattr(model, "hf_device_map", None) or {}
    if len({*map(str, spread.values())}) > 1:
        raise ModelError(
            f"the model is spread over {', '.join(sorted({*map(str, spread.values())}))}: load it "
            "on one device (--device cpu)."
        )
    odd = [name for name, p in model.named_parameters() if not p.is_floating_point() or p.is_meta]
    if odd or getattr(model, "is_quantized", False):
        raise ModelError(
            f"{method.name} needs the weights themselves, and these are quantised or not loaded "
            f"({odd[0] if odd else 'is_quantized'}): load the model in float32."
        )


def _calibration(
    model: PreTrainedModel,
    method: Conversion,
    tokenizer: PreTrainedTokenizerBase | None,
    given: Tensor | Texts | None,
) -> Calibration | None:
    if not method.calibrates and not method.asks_for_keys:
        if given is not None:
            raise MethodError(f"{method.name} reads no text: leave the calibration out.")
        return None
    if not method.calibrates and isinstance(given, Tensor):
        raise MethodError(f"{method.name} hides keys in text: pass texts as calibration=, not ids.")
    device = next(model.parameters()).device
    if isinstance(given, Tensor) and method.asks_for_keys and tokenizer is None:
        raise MethodError(
            f"{method} asks for keys hidden in text: pass the model's tokenizer= too."
        )
    long = max(_ROW, 4 * method.same_within)  # so that most keys lie behind that
    row, long = (min(window(model) or tokens, tokens) for tokens in (_ROW, long))
    if isinstance(given, Tensor):
        high = int(text_config(model).vocab_size)
        if given.ndim != 2 or given.dtype != torch.int64 or not given.numel():
            raise DataError(
                f"calibration is {given.dtype} {[*given.shape]}: expected token ids, int64 "
                "[rows, tokens]."
            )
        if not 0 <= int(given.min()) <= int(given.max()) < high:
            raise DataError(
                f"calibration has ids from {int(given.min())} to {int(given.max())}, and the model "
                f"{high} tokens: tokenise it by the model's own tokenizer."
            )
        return Calibration(given.to(device), _prompts(method, tokenizer, held_in(), long))
    if tokenizer is None:
        raise MethodError(
            f"{method.name} reads text to choose what it does: pass the model's tokenizer= (and "
            "texts as calibration=, where the house's are not to be read), or token ids as "
            "calibration=."
        )
    texts = given or held_in()
    ids = _rows(tokenizer, texts, row) if method.calibrates else torch.empty((0, 0)).long()
    return Calibration(ids.to(device), _prompts(method, tokenizer, texts, long))


def _prompts(
    method: Conversion, tokenizer: PreTrainedTokenizerBase | None, texts: Texts, length: int
) -> tuple[Prompt, ...]:
    """Keys of the split "train" in the text, at depths all over it, where the method asks."""
    if not method.asks_for_keys or tokenizer is None:
        return ()
    count = max(_PROMPTS, _TOKENS // length)
    haystack = Texts(_part(texts, length, count), name=texts.name)
    settings: dict[str, Any] = {"haystack": haystack, "split": "train", "wording": SHORT}
    return tuple(
        passkey(tokenizer, length, depth=(i + 0.5) / count, seed=i, **settings)
        for i in range(count)
    )


def _rows(tokenizer: PreTrainedTokenizerBase, texts: Texts, length: int) -> Tensor:
    """Rows [N, length] from all over the texts, BOS first where the tokenizer puts one."""
    bos = bos_of(tokenizer)
    size, rows = length - len(bos), _TOKENS // length
    ids = [x for document in _part(texts, length, rows) for x in encode(tokenizer, document)]
    if len(ids) < size:
        raise DataError(
            f"calibration text {texts.name!r} has {len(ids)} tokens: expected {size} or more."
        )
    starts = torch.linspace(0, len(ids) - size, min(rows, len(ids) // size)).int().tolist()
    return torch.tensor([[*bos, *ids[start : start + size]] for start in starts])


def _part(texts: Texts, length: int, rows: int) -> tuple[str, ...]:
    """Beginnings of documents from all over the texts: the whole takes minutes to tokenise."""
    share = max(1, len(texts.documents) // rows)
    return tuple(document[: 16 * length] for document in texts.documents[::share])


def _checks(made: PreTrainedModel, method: Conversion, off: float) -> Sequence[Check]:
    """What a few tokens show of the new model."""
    ids = _ids(made, _proof_tokens(made, method))
    whole = _last_logits(made, ids)
    cached = _cached(made, ids)
    apart = float((cached - whole[:, -cached.shape[1] :]).abs().max() / whole.abs().max())
    limit = 1e-3 if _tolerance(made) == _EXACT else 0.1
    checks = [
        Check("logits finite", bool(whole.isfinite().all()), f"{whole.numel():,} of them"),
        Check("cached as uncached", apart <= limit, f"to {apart:.1e} of the largest logit"),
    ]
    if method.exact:
        detail = f"to {off:.1e} of the largest logit"
        checks.append(Check("logits of the original", off <= _tolerance(made), detail))
    else:
        checks.append(Check("logits move", True, f"by {off:.2g} of the largest, before training"))
    return checks


def _proof_tokens(model: PreTrainedModel, method: Conversion) -> int:
    """Tokens of which some see beyond what stays the same, within the model's window."""
    tokens = method.same_within + _PROOF
    return min(window(model) or tokens, tokens)


def _last_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    out: Any = model(input_ids=ids, use_cache=False, logits_to_keep=_PROOF)
    return out.logits.float()


def _ids(model: PreTrainedModel, tokens: int = _PROOF) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(text_config(model).vocab_size), (1, tokens), generator=generator)
    return ids.to(next(model.parameters()).device)


def _cached(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the last tokens, read after a cache of those before."""
    cache = DynamicCache(config=model.config)
    last = _PROOF - _CACHED
    model(input_ids=ids[:, :-last], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return model(input_ids=ids[:, -last:], past_key_values=cache, use_cache=True).logits


def _cache_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """What the cache takes for a token, and for a row whatever its length, by one that is there."""
    with evaluating(model), torch.no_grad():
        ids = _ids(model)[:, :_CACHED]
        cache: Any = DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    token = bounded = 0
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            bounded += layer.bytes
            continue
        pair = (layer.keys, layer.values)
        held = sum(t.numel() * t.element_size() // max(1, t.shape[-2]) for t in pair)
        if isinstance(layer, DynamicSlidingWindowLayer):
            bounded += held * (layer.sliding_window - 1)  # the query's own token is not kept
        else:
            token += held
    return token, bounded
