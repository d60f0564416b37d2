"""The one reversible call: `extend` gives a model instance a method, its patch takes it back."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .conversion import recorded
from .errors import LongctxError, MethodError, ModelError
from .model import (
    decoder_of,
    rope_of,
    rotary_of,
    scaled_rope,
    text_config,
    unwrapped,
)
from .patch import HANDLE, Check, Method, Patch, patch_of, roll_back, slot_holder
from .proof import can_run, prove, run_passes
from .registry import make_method, method_class, parse_methods
from .rope import frequencies_of
from .twin import follow_config

__all__ = ["extend", "extend_all"]


def extend(
    model: nn.Module,
    method: Method | str,
    *,
    replace: bool = False,
    prove_effect: bool = True,
    **fields: Any,
) -> Patch:
    """Give `model` a longer window, in place and reversibly.

    Args:
        model: a transformers decoder, also inside PEFT, `torch.compile` or data-parallel
            wrappers; its weights are not touched.
        method: an instance (`Yarn(factor=4)`), a name with its fields as keywords
            (`"yarn", factor=4`) or as the command line writes it: `"yarn:4"`, or several on top of
            each other, `"yarn:2+log_n"`.
        replace: allow replacing the RoPE scaling that a checkpoint ships with (llama3, yarn, …);
            its `rope_theta` and original window are kept.
        prove_effect: run the model on 32 tokens before and after, with and without a cache, and
            refuse a method that changes no logits or gives others with a cache. A model on the
            meta device is not run.
        **fields: the method's own fields, with a name only.

    Returns:
        The patch: `report()` proves the effect, `remove()` undoes it, `with` borrows it. Of several
        methods the topmost, which reports and removes those below it too.

    Raises:
        MethodError: unknown method or field, an impossible setting, a slot already taken, or
            scaled RoPE in place without `replace`.
        ModelError: a model type that the method cannot reach or serve.
    """
    model = unwrapped(model)
    *lower, method = _resolve(method, fields)
    if lower:
        methods = (*lower, method)
        patches = extend_all(model, methods, replace=replace, prove_effect=prove_effect)
        for patch in patches[1:]:
            patch.joined = True
        return patches[-1]
    decoder_of(model)  # refuses what cannot be reached, before anything else is asked
    below = patch_of(model)
    _refuse_taken_slots(method, model)
    if below is None:
        _refuse_lost_record(model)
    if "rotary" in method.slots:
        _refuse_scaled(model, method, replace)
    patch = Patch(model, method, below.rope if below else rope_of(model), below)
    rotary, config = rotary_of(model), copy.deepcopy(model.config)
    before = run_passes(model, patch) if prove_effect and can_run(model) else None
    try:
        method.apply(model, patch)
        follow_config(model, config, patch.set)
        _refuse_continuous_batching(model, patch)
        patch.set(model.config, "longctx", _record(model, patch, config))
        patch.set(model, HANDLE, patch)
        _refuse_failed(patch, patch.report().checks)
        if before is not None:
            changed = _turns_otherwise(model, patch, rotary)
            patch.proven = tuple(prove(model, patch, before, rotary_changed=changed))
            _refuse_failed(patch, patch.proven)
    except BaseException as error:
        roll_back(patch)
        if isinstance(error, LongctxError) or not isinstance(error, Exception):
            raise
        raise ModelError(  # a family whose config or rotary is another than those we know
            f"{method.name} cannot serve model type {model.config.model_type!r}: its rotary or its "
            f"config is of a form that longctx does not know ({type(error).__name__}: {error})."
        ) from error
    return patch


def extend_all(
    model: nn.Module,
    methods: Sequence[Method],
    *,
    replace: bool = False,
    prove_effect: bool = True,
) -> tuple[Patch, ...]:
    """Put methods on top of each other, the lowest first; all of them, or none.

    Args:
        model: as in `extend`.
        methods: instances, as `parse_methods("yarn:2+log_n")` gives them; none change nothing.
        replace: as in `extend`.
        prove_effect: as in `extend`.

    Returns:
        A patch for each. Remove them in the opposite order.

    Raises:
        MethodError, ModelError: as `extend`, naming the method; those below are off again.
    """
    patches: list[Patch] = []
    try:
        for method in methods:
            patches += [extend(model, method, replace=replace, prove_effect=prove_effect)]
    except BaseException as error:
        for patch in reversed(patches):
            patch.remove()
        if isinstance(error, LongctxError) and len(methods) > 1:
            names = "+".join(method.name for method in methods)
            said = f"{methods[len(patches)].name} in {names}: {error}"
            raise type(error)(said) from error
        raise
    return tuple(patches)


_CONTINUOUS = (
    "generate_batch",
    "init_continuous_batching",
    "continuous_batching_context_manager",
)


def _refuse_continuous_batching(model: PreTrainedModel, patch: Patch) -> None:
    """Paged caches put several requests into one row, which only fixed frequencies do not mind."""
    if patch.method.length_invariant and set(patch.method.slots) == {"rotary"}:
        return
    for name in _CONTINUOUS:
        if hasattr(model, name):
            patch.set(model, name, functools.partial(_no_continuous_batching, patch.method.name))


def _no_continuous_batching(method: str, *args: Any, **kwargs: Any) -> NoReturn:
    """Stands in place of a model instance's methods; pickled with it."""
    del args, kwargs
    raise MethodError(
        f"{method} does not work with continuous batching (generate_batch), whose paged cache puts "
        "requests of different lengths into one row: use model.generate, or a method that changes "
        "frequencies only (yarn, ntk, linear)."
    )


def _turns_otherwise(model: PreTrainedModel, patch: Patch, before: nn.Module) -> bool:
    """Whether the rotary in place turns in another way than the one that was there."""
    if not patch.method.length_invariant:
        return True
    kind = patch.rope.layer_type
    one, scaling = frequencies_of(rotary_of(model), kind)
    other, own = frequencies_of(before, kind)
    # A formula at its neutral setting may round the last bit otherwise.
    return scaling != own or not torch.allclose(one.float(), other.float(), rtol=1e-6, atol=0)


def _refuse_failed(patch: Patch, checks: tuple[Check, ...]) -> None:
    failed = [check for check in checks if not check.ok]
    if failed:
        raise MethodError(
            f"{patch.method.name} did not take effect on {patch.model.config.model_type!r} and was "
            "undone: " + "; ".join(f"{c.name} ({c.detail})" for c in failed)
        )


def _resolve(method: Method | str, fields: dict[str, Any]) -> tuple[Method, ...]:
    """One method, or several that a word names."""
    if isinstance(method, str):
        if method != "none" and not {":", "+"} & {*method}:
            return (make_method(method, fields),)
        if fields:
            raise MethodError(f"pass fields inside {method!r} or as keywords, not both.")
        parsed = parse_methods(method)
        if not parsed:
            raise MethodError("'none' is the unpatched model: there is nothing to extend.")
        return parsed
    if fields:
        raise MethodError(f"{method!r} is complete: set {', '.join(fields)} on it instead.")
    if getattr(method, "slots", ()) == ("weights",):
        method_class(method.name)  # which says that it goes through convert
    if isinstance(method, type) or not isinstance(method, Method):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MethodError(
            f"expected a method instance such as Yarn(factor=4) or a name, got {method!r}."
        )
    return (method,)


def _refuse_taken_slots(method: Method, model: PreTrainedModel) -> None:
    made_by = recorded(model)
    if made_by is not None and set(method.slots) != {"rotary"}:
        raise MethodError(
            f"the attention of this model is that of {made_by}, which {method.name} would replace: "
            "extend it by a method that changes frequencies only (yarn, ntk, linear)."
        )
    for slot in method.slots:
        holder = slot_holder(model, slot)
        if holder is not None:
            raise MethodError(
                f"{holder} is already on this model and holds its {slot} slot; call "
                f"longctx.patch_of(model).remove() before extending it by {method.name}, or start "
                "from the checkpoint that it was made from."
            )
    remapping = slot_holder(model, "positions")
    if "rotary" in method.slots and remapping is not None:
        raise MethodError(
            f"{remapping} counts on the window that was there before it: extend by {method.name} "
            f"first, then by {remapping.name} on top."
        )


def _refuse_lost_record(model: PreTrainedModel) -> None:
    """A saved patch that plain transformers loaded: its window would be taken for the original."""
    record: Any = getattr(model.config, "longctx", None)
    if record is not None:
        methods: Any = record.get("methods") if isinstance(record, dict) else None
        entries: list[Any] = methods if isinstance(methods, list) else []
        names = [str(entry.get("name")) for entry in entries if isinstance(entry, dict)]
        said = ", ".join(names) or "its record is damaged"
        raise MethodError(
            f"this model was extended before ({said}), which plain transformers cannot undo: load "
            "it with longctx.load, call longctx.patch_of(model).remove(), then extend it."
        )


def _refuse_scaled(model: PreTrainedModel, method: Method, replace: bool) -> None:
    config = text_config(model)
    kind = scaled_rope(config)
    if kind is not None and not replace:
        raise MethodError(
            f"the model ships with {kind!r} RoPE scaling ({config.rope_parameters}); "
            f"pass replace=True to put {method.name} in its place, counted from the original "
            f"window of {rope_of(model).length} tokens."
        )


def _record(model: PreTrainedModel, patch: Patch, before: PreTrainedConfig) -> dict[str, Any]:
    """What `config.json` keeps, so that `longctx.load` finds the method and its undo."""
    entry = {"name": patch.method.name, **dataclasses.asdict(patch.method)}  # pyright: ignore[reportArgumentType]
    if patch.below is not None:
        below: dict[str, Any] = model.config.longctx
        return {**below, "methods": [*below["methods"], entry]}
    text = before.get_text_config(decoder=True)
    keys = ("max_position_embeddings", "rope_parameters")
    return {"version": 1, "methods": [entry], "original": {k: getattr(text, k) for k in keys}}
