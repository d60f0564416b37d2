"""The one reversible call: `extend` gives a model instance a method, its patch takes it back."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedModel

from .errors import MethodError
from .model import decoder_of, rope_of, scaled_rope, text_config
from .patch import HANDLE, Method, Patch, patch_of, roll_back, slot_holder
from .registry import make_method, parse_method

__all__ = ["extend"]


def extend(
    model: PreTrainedModel, method: Method | str, *, replace: bool = False, **fields: Any
) -> Patch:
    """Give `model` a longer window, in place and reversibly.

    Args:
        model: a transformers decoder; its weights are not touched.
        method: an instance (`Yarn(factor=4)`), a name with its fields as keywords
            (`"yarn", factor=4`) or as the command line writes it (`"yarn:4"`).
        replace: allow replacing the RoPE scaling that a checkpoint ships with (llama3, yarn, …);
            its `rope_theta` and original window are kept.
        **fields: the method's own fields, with a name only.

    Returns:
        The patch: `report()` proves the effect, `remove()` undoes it, `with` borrows it.

    Raises:
        MethodError: unknown method or field, an impossible setting, a slot already taken, or
            scaled RoPE in place without `replace`.
        ModelError: a model type that the method cannot reach.
    """
    method = _resolve(method, fields)
    decoder_of(model)  # refuses what cannot be reached, before anything else is asked
    below = patch_of(model)
    _refuse_taken_slots(method, model)
    if below is None:
        _refuse_lost_record(model)
    if "rotary" in method.slots:
        _refuse_scaled(model, method, replace)
    patch = Patch(model, method, below.rope if below else rope_of(model), below)
    try:
        method.apply(model, patch)
        patch.set(model.config, "longctx", _record(model, patch))
        patch.set(model, HANDLE, patch)
        failed = [check for check in patch.report().checks if not check.ok]
        if failed:
            raise MethodError(
                f"{method.name} did not take effect on {model.config.model_type!r} and was undone: "
                + "; ".join(f"{c.name} ({c.detail})" for c in failed)
            )
    except BaseException:
        roll_back(patch)
        raise
    return patch


def _resolve(method: Method | str, fields: dict[str, Any]) -> Method:
    if isinstance(method, str):
        if ":" in method or method == "none":
            if fields:
                raise MethodError(f"pass fields inside {method!r} or as keywords, not both.")
            parsed = parse_method(method)
            if parsed is None:
                raise MethodError("'none' is the unpatched model: there is nothing to extend.")
            return parsed
        return make_method(method, fields)
    if fields:
        raise MethodError(f"{method!r} is complete: set {', '.join(fields)} on it instead.")
    if isinstance(method, type) or not isinstance(method, Method):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MethodError(
            f"expected a method instance such as Yarn(factor=4) or a name, got {method!r}."
        )
    return method


def _refuse_taken_slots(method: Method, model: PreTrainedModel) -> None:
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
        names = ", ".join(str(entry.get("name")) for entry in record.get("methods", []))
        raise MethodError(
            f"this model was extended before ({names}), which plain transformers cannot undo: load "
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


def _record(model: PreTrainedModel, patch: Patch) -> dict[str, Any]:
    """What `config.json` keeps, so that `longctx.load` finds the method and its undo."""
    entry = {"name": patch.method.name, **dataclasses.asdict(patch.method)}  # pyright: ignore[reportArgumentType]
    if patch.below is not None:
        below: dict[str, Any] = model.config.longctx
        return {**below, "methods": [*below["methods"], entry]}
    undo = {name: value for obj, name, value in patch.undo if obj is text_config(model)}
    config = text_config(model)
    original = {
        key: undo.get(key, getattr(config, key))
        for key in ("max_position_embeddings", "rope_parameters")
    }
    return {"version": 1, "methods": [entry], "original": original}
