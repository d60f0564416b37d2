"""Which layers a conversion leaves as they are: named, or chosen by what keys lose without them."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from longctx.errors import MethodError
from longctx.prompts.assembly import Prompt

__all__ = ["Keep", "checked_keep", "chosen", "loss_of_keys", "lost_without", "refuse_keep"]

Keep = tuple[int, ...] | str
"""Layers by index from 0, or "auto:N": the N whose replacement costs keys most."""

_log = logging.getLogger(__name__)
_AUTO = re.compile(r"auto:(\d+)")


def checked_keep(name: str, keep: Any) -> Keep:
    """Layers sorted and each once, or "auto:N" as it is.

    Args:
        name: of the method, for the message.
        keep: as the user gave it: a layer, layers, or "auto:N" with N of at least 1.

    Raises:
        MethodError: anything else.
    """
    layers: Any = (keep,) if type(keep) is int else keep
    if isinstance(layers, list | tuple) and all(type(x) is int and x >= 0 for x in layers):  # pyright: ignore[reportUnknownVariableType]
        return tuple(sorted({*layers}))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(keep, str) and (found := _AUTO.fullmatch(keep)) and int(found[1]):
        return keep
    raise MethodError(
        f'{name}: keep={keep!r}: expected layers, (0, 2), or how many are to be chosen, "auto:1".'
    )


def refuse_keep(name: str, keep: Keep, full: Sequence[int]) -> None:
    """Refuse to keep all layers, or layers that are not there.

    Args:
        name: of the method, for the message.
        keep: from `checked_keep`.
        full: the layers of full attention.

    Raises:
        MethodError: as said.
    """
    beyond = [index for index in keep if index not in full] if isinstance(keep, tuple) else []
    if beyond:
        raise MethodError(
            f"{name}: keep={keep!r}: layer {beyond[0]} is not one of full attention: expected some "
            f"of {', '.join(map(str, full))}."
        )
    if _count(keep) >= len(full):
        raise MethodError(
            f"{name}: keep={keep!r} leaves no layer to change: expected {len(full) - 1} at most."
        )


def chosen(keep: Keep, lost: Mapping[int, float]) -> tuple[int, ...]:
    """The layers that are kept.

    Args:
        keep: from `checked_keep`.
        lost: from `lost_without`, where layers are to be chosen.
    """
    if isinstance(keep, tuple):
        return keep
    cost = {index: math.inf if math.isnan(nats) else nats for index, nats in lost.items()}
    return tuple(sorted(sorted(cost, key=lambda index: -cost[index])[: _count(keep)]))


def lost_without(
    layers: Sequence[int],
    replaced: Callable[[Sequence[int]], AbstractContextManager[PreTrainedModel]],
    prompts: Sequence[Prompt],
) -> dict[int, float]:
    """What the answers' NLL rises by, in nats a token, with one layer replaced at a time.

    Args:
        layers: by index.
        replaced: the model with these layers replaced, as long as the context lasts.
        prompts: keys hidden in text and asked for.
    """
    with replaced(()) as model:
        base = _nats(model, prompts)
    found: dict[int, float] = {}
    for index in layers:
        with replaced((index,)) as model:
            found[index] = _nats(model, prompts) - base
        _log.info("layer %d replaced: %s", index, loss_of_keys(found[index]))
    return found


def loss_of_keys(nats: float) -> str:
    """What a layer's replacement costs, in words."""
    return f"keys lose {nats:.2f} nats a token".replace("-0.00", "0.00")


def _nats(model: PreTrainedModel, prompts: Sequence[Prompt]) -> float:
    """The answers' mean NLL, in nats a token."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids], device=device)
        answer = ids.shape[1] - prompt.answer_start
        out: Any = model(input_ids=ids, use_cache=False, logits_to_keep=answer + 1)
        total += float(
            functional.cross_entropy(
                out.logits[0, :-1].float(), ids[0, prompt.answer_start :], reduction="sum"
            )
        )
        count += answer
    return total / count


def _count(keep: Keep) -> int:
    return len(keep) if isinstance(keep, tuple) else int(keep.removeprefix("auto:"))
