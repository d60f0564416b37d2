"""A model built from a config without its weights, to see what the config says of each module.

Beside its rotary a family may derive other things from `rope_parameters` when it is built
(DeepSeek: the scaling of attention). What a config means is read off such a twin: parameters on
the meta device, buffers that no checkpoint holds as they would be loaded.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import ModelError
from .model import declare_window

__all__ = ["build_twin", "build_with_weights", "differences", "follow_config"]

_log = logging.getLogger(__name__)
_Plain = int | float | str | None
_SHOWN = 3  # names in a message
_OF_A_RUN = ("training", "gradient_checkpointing", "name_or_path")
"""Attributes that say what is done with a model, not what it computes."""


def build_twin(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class from `config`, weights on the meta device.

    Buffers that are not saved are on the CPU; those that the family cannot compute without
    weights are all NaN.

    Raises:
        ModelError: the class builds no model from this config.
    """
    return _empty(type(model), config)


def build_with_weights(
    build: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> PreTrainedModel:
    """A model of a class from a config and all of its weights, which are not copied.

    Args:
        build: the class.
        config: of the new model.
        weights: by the names of its state dict.
        buffers: of the model that they come from; for those that no checkpoint holds and the
            family does not compute without weights (Gemma's scale of embeddings).

    Returns:
        The model in eval mode, on the device and in the dtype of the weights.

    Raises:
        ModelError: the class builds no such model, or weights are missing, left over or of another
            shape.
    """
    made: Any = _empty(build, config)
    wanted = {name: tensor.shape for name, tensor in made.state_dict().items()}
    odd = [
        *(f"{name} is missing" for name in wanted if name not in weights),
        *(f"{name} has no place" for name in weights if name not in wanted),
        *(
            f"{name} is {[*weights[name].shape]}, not {[*shape]}"
            for name, shape in wanted.items()
            if name in weights and weights[name].shape != shape
        ),
    ]
    if odd:
        raise ModelError(
            f"{build.__name__} cannot hold these weights: {'; '.join(odd[:_SHOWN])}"
            f"{f' and {len(odd) - _SHOWN} more' if odd[_SHOWN:] else ''}."
        )
    made.load_state_dict(dict(weights), assign=True)
    made.tie_weights()
    device = next(iter(weights.values())).device
    for place, buffer in list(made.named_buffers()):
        if buffer.is_meta or _unknown(buffer):
            if place not in buffers or buffers[place].shape != buffer.shape:
                raise ModelError(
                    f"{build.__name__} does not say how its buffer {place} is made from the config."
                )
            buffer = buffers[place].clone()
        home, _, name = place.rpartition(".")
        setattr(made.get_submodule(home), name, buffer.to(device))
    for parameter in made.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return made.eval()


def _empty(build: Any, config: PreTrainedConfig) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # pyright: ignore[reportPrivateUsage]
    try:
        with torch.device("meta"):
            twin: PreTrainedModel = build._from_config(config)
        _fill_unsaved(twin)
    except Exception as error:
        raise ModelError(
            f"{build.__name__} cannot be built from its config ({type(error).__name__}: {error})."
        ) from error
    return twin


def _fill_unsaved(twin: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds, as loading does."""
    for module in twin.modules():
        unsaved = module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
        for name in unsaved:
            buffer = getattr(module, name)
            if buffer is not None and buffer.is_floating_point():
                setattr(module, name, torch.full_like(buffer, torch.nan, device="cpu"))
            elif buffer is not None:
                setattr(module, name, torch.zeros_like(buffer, device="cpu"))
        if unsaved and not any(True for _ in module.parameters()):
            with torch.no_grad():
                twin._init_weights(module)  # pyright: ignore[reportPrivateUsage]


def follow_config(
    model: PreTrainedModel, before: PreTrainedConfig, put: Callable[[Any, str, Any], None]
) -> None:
    """Let what says the window, or is derived from the config, follow the config as it is now.

    Args:
        model: whose rotary is that of its config already.
        before: its config as it was, which the rest still follows.
        put: sets an attribute, as `Patch.set` does.
    """
    if model.config.to_dict() == before.to_dict():
        return
    declare_window(model, before.get_text_config(decoder=True), put)
    try:
        old, new = build_twin(model, before), build_twin(model, model.config)
    except ModelError as error:  # remote code, say; whatever proves a method still does
        _log.warning(
            "%s What it derives from its config besides the rotary was not looked at.", error
        )
        return
    known = {(name, key): value for name, key, value in _plain_attributes(old)}
    for name, key, value in _plain_attributes(new):
        if "rotary" not in name and known.get((name, key), value) != value:
            module = model.get_submodule(name)
            if key in vars(module):
                put(module, key, value)


def differences(model: PreTrainedModel, twin: PreTrainedModel) -> list[str]:
    """Buffers and plain attributes of `model` that its twin has otherwise, each in words.

    A patch's rotary is compared by the native one inside it.
    """
    found: list[str] = []
    own = {_native(name): buffer for name, buffer in model.named_buffers()}
    for name, buffer in twin.named_buffers():
        mine = own.get(name)
        if mine is None or buffer.is_meta or mine.is_meta or _unknown(buffer):
            continue
        if mine.dtype != buffer.dtype and "inv_freq" not in name:
            buffer = buffer.to(mine.dtype)
        if mine.shape != buffer.shape:
            found.append(f"{name} has shape {[*mine.shape]}, as saved {[*buffer.shape]}")
        elif not torch.equal(mine.cpu().to(buffer.dtype), buffer):
            off = (mine.cpu().double() - buffer.double()).abs().max().item()
            found.append(f"{name} differs by {off:.1e}")
    attributes = {(_native(name), key): value for name, key, value in _plain_attributes(model)}
    for name, key, value in _plain_attributes(twin):
        mine = attributes.get((name, key), value)
        if key != "rope_type" and mine != value:
            found.append(f"{name}.{key} is {mine!r}, as saved {value!r}")
    return found


def _native(name: str) -> str:
    return name.replace(".native", "")


def _unknown(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and bool(buffer.isnan().all())


def _plain_attributes(model: nn.Module) -> Iterator[tuple[str, str, _Plain]]:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") and key not in _OF_A_RUN and isinstance(value, _Plain):
                yield name, key, value
