"""The entry "longctx" of a config.json: which methods a checkpoint was saved with, put in place."""

from __future__ import annotations

import copy
import json
from typing import Annotated, Any

from msgspec import Meta, Struct
from transformers import PreTrainedModel

from .core import extend
from .errors import LongctxError, MethodError, ModelError
from .model import build_rotary, put_rope_parameters, put_rotary, rope_entry, text_config
from .patch import Method, methods_of
from .registry import make_method
from .schema import conform
from .twin import follow_config

__all__ = ["refuse_unrestored", "restore"]

_ANEW = "Extend the original anew, or delete the entry 'longctx' from config.json."


class _Original(Struct, forbid_unknown_fields=True):
    """What methods took the place of."""

    max_position_embeddings: Annotated[int, Meta(ge=1, le=10**12)]
    rope_parameters: dict[str, Any] | None


class _Record(Struct, forbid_unknown_fields=True):
    """The entry "longctx" of a config.json."""

    version: Annotated[int, Meta(ge=1)]
    original: _Original
    methods: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    """Their names and fields, the lowest first."""
    native_type: str | None = None
    """The family's model type, where config.json has ours in its place."""


def restore(model: PreTrainedModel) -> None:
    """Put the recorded methods in place over the recorded original, so that they can be undone.

    A model without a record is left as it is.

    Raises:
        LongctxError: the record is damaged, of a later release, or does not fit the model.
    """
    record: Any = getattr(model.config, "longctx", None)
    if record is None:
        return
    model.config.architectures = [type(model).__name__]  # the file may name one for engines
    where = f"{model.config.name_or_path}/config.json, entry longctx"
    checked = _checked(record, where)
    try:
        _put_back(model, checked)
    except LongctxError as error:
        raise type(error)(f"{where}: {error}") from error
    except (
        Exception
    ) as error:  # transformers and torch fail in many ways on settings that cannot be
        raise ModelError(f"{where}: it does not fit this model ({error!r}). {_ANEW}") from error


def refuse_unrestored(model: PreTrainedModel) -> None:
    """Refuse a model whose config records methods that are not in place: it computes another one.

    Plain transformers loads it so from a checkpoint of methods that its config cannot say.

    Raises:
        ModelError: such a model, or a damaged record.
    """
    record: Any = getattr(model.config, "longctx", None)
    if record is None or methods_of(model):
        return
    where = "config.longctx"
    try:
        recorded = [_method(entry) for entry in _checked(record, where).methods]
    except MethodError as error:
        raise ModelError(f"{where}: {error}") from error
    if lost := [method.name for method in recorded if not method.plain_loadable]:
        raise ModelError(
            f"this model's config records {', '.join(lost)}, which is not in place: plain "
            "transformers loaded it. Load it with longctx.load, or delete config.longctx to save "
            "the model that it computes now."
        )


def _checked(record: Any, where: str) -> _Record:
    checked = conform(record, _Record, where, next_step=_ANEW, error=ModelError)
    if checked.version != 1:
        raise ModelError(f"{where}: version: expected 1, got {checked.version}. Upgrade longctx.")
    return checked


def _method(entry: dict[str, Any]) -> Method:
    fields = {key: value for key, value in entry.items() if key != "name"}
    return make_method(str(entry.get("name")), fields)


def _put_back(model: PreTrainedModel, record: _Record) -> None:
    config, before = text_config(model), copy.deepcopy(model.config)
    saved = {key: copy.deepcopy(getattr(config, key)) for key in record.original.__struct_fields__}
    config.max_position_embeddings = record.original.max_position_embeddings
    put_rope_parameters(config, record.original.rope_parameters, setattr)
    _, layer_type = rope_entry(config)
    put_rotary(model, build_rotary(model, layer_type), setattr)
    delattr(model.config, "longctx")
    follow_config(model, before, setattr)
    for entry in record.methods:
        extend(model, _method(entry), replace=True)
    for key, value in saved.items():
        now = _as_then(getattr(config, key), value)
        if json.dumps(value, sort_keys=True) != json.dumps(now, sort_keys=True):
            raise ModelError(
                f"config.json says {key}={value}, its longctx record {record.methods} means "
                f"{getattr(config, key)}: it was edited after saving. Extend the original anew "
                "(longctx.extend), or delete the entry 'longctx' to load what the config says."
            )


def _as_then(value: Any, saved: Any) -> Any:
    """Settings as a checkpoint of an earlier version has them, which did not say `mscale`."""
    if not isinstance(value, dict) or not isinstance(saved, dict):
        return value
    return {
        key: _as_then(entry, saved.get(key))
        for key, entry in value.items()
        if key in saved or key not in ("mscale", "mscale_all_dim")
    }
