"""The one reversible call: `extend` gives a model instance a method, `Patch` takes it back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel

from .errors import MethodError
from .methods import Check, Method, make_method, parse_method
from .model import decoder_of, rope_of, scaled_rope, text_config
from .rope import Rope

__all__ = ["Patch", "Report", "extend", "patch_of"]

_HANDLE = "_longctx_patch"


class _Missing:
    """Stands for an attribute that was not there; a class, since a copy of one is itself."""


@dataclass(frozen=True, slots=True)
class Report:
    """Proof of effect: what `extend` promised, looked up in the patched model."""

    method: Method
    original_window: int
    window: int
    plain_loadable: bool
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        where = "plain transformers" if self.plain_loadable else "longctx.load only"
        lines = [
            f"{self.method}",
            f"  window {self.original_window} → {self.window} tokens; saved checkpoint: {where}",
            *(f"  {'ok  ' if c.ok else 'FAIL'} {c.name}: {c.detail}" for c in self.checks),
        ]
        return "\n".join(lines)


@dataclass(slots=True)
class Patch:
    """A method in place on one model: the undo log and the handle.

    As a context manager it removes itself at the end of the block.
    """

    model: PreTrainedModel
    method: Method
    rope: Rope
    """The geometry the model was trained with."""
    below: Patch | None
    """The patch that this one was put on top of."""
    undo: list[tuple[Any, str, Any]] = field(default_factory=list)
    """(object, attribute, what was there) in the order of the changes."""

    def set(self, obj: Any, name: str, value: Any) -> None:
        """Set `obj.name` and remember what was there, so that `remove` can put it back."""
        self.undo.append((obj, name, _own(obj, name)))
        setattr(obj, name, value)

    @property
    def active(self) -> bool:
        """Whether it is still in place."""
        patch = patch_of(self.model)
        while patch is not None and patch is not self:
            patch = patch.below
        return patch is self

    def report(self) -> Report:
        """Verify the method on the model as it is now.

        Raises:
            MethodError: the patch was removed.
        """
        if not self.active:
            raise MethodError(f"{self.method.name} was removed from the model: nothing to report.")
        window = int(text_config(self.model).max_position_embeddings)
        return Report(
            method=self.method,
            original_window=self.rope.length,
            window=window,
            plain_loadable=self.method.native_rope(self.rope) is not None,
            checks=tuple(self.method.verify(self.model, self)),
        )

    def remove(self) -> None:
        """Put back, in reverse, everything that was changed: bit for bit the model of before.

        Raises:
            MethodError: already removed, or another patch lies on top of it.
        """
        top = patch_of(self.model)
        if not self.active:
            raise MethodError(f"{self.method.name} is not on this model any more.")
        if top is not None and top is not self:
            raise MethodError(
                f"{top.method.name} was put on top of {self.method.name}: remove it first "
                "(`longctx.patch_of(model).remove()`)."
            )
        _roll_back(self)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.active:
            self.remove()


def _roll_back(patch: Patch) -> None:
    while patch.undo:
        obj, name, value = patch.undo.pop()
        if value is _Missing:
            delattr(obj, name)
        else:
            setattr(obj, name, value)


def _own(obj: Any, name: str) -> Any:
    """The attribute where it belongs to the instance; a class attribute comes back by deletion."""
    for store in ("__dict__", "_parameters", "_buffers", "_modules"):
        values = getattr(obj, store, {})
        if name in values:
            return values[name]
    return _Missing


def patch_of(model: PreTrainedModel) -> Patch | None:
    """The patch in place on `model` (the topmost where two are stacked), None if there is none."""
    return model.__dict__.get(_HANDLE)


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
    _refuse_taken_slots(method, below)
    if below is None:
        _refuse_lost_record(model)
    if "rotary" in method.slots:
        _refuse_scaled(model, method, replace)
    patch = Patch(model, method, below.rope if below else rope_of(model), below)
    try:
        method.apply(model, patch)
        patch.set(model.config, "longctx", _record(model, patch))
        patch.set(model, _HANDLE, patch)
        failed = [check for check in patch.report().checks if not check.ok]
        if failed:
            raise MethodError(
                f"{method.name} did not take effect on {model.config.model_type!r} and was undone: "
                + "; ".join(f"{c.name} ({c.detail})" for c in failed)
            )
    except BaseException:
        _roll_back(patch)
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


def _refuse_taken_slots(method: Method, patch: Patch | None) -> None:
    while patch is not None:
        shared = [slot for slot in method.slots if slot in patch.method.slots]
        if shared:
            raise MethodError(
                f"{patch.method} is already on this model and holds its {shared[0]} slot; call "
                f"longctx.patch_of(model).remove() before extending it by {method.name}, or start "
                "from the checkpoint that it was made from."
            )
        patch = patch.below


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
