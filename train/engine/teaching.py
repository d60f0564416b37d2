"""Uptraining a converted model: the teacher beside it, and which of its weights are trained."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Literal, TypeAlias, get_args

from torch import nn
from transformers import PreTrainedModel

from longctx.attention.hook import ATTRIBUTE
from longctx.errors import RunError
from longctx.model import attention_modules, evaluating, text_config

from ..config import Training
from ..loss.objective import Losses
from .packed_attention import packed_attention

__all__ = ["TrainedWeights", "frozen", "listening", "refuse_teacher"]

TrainedWeights: TypeAlias = Literal["all", "attention", "features"]
"""All weights, those of the attention, or those that a conversion gave the attention."""


def refuse_teacher(
    model: PreTrainedModel, teacher: PreTrainedModel | None, losses: Losses, training: Training
) -> None:
    """Refuse a teacher that does not go with the rest.

    Raises:
        RunError: it names what does not, and the way out.
    """
    if (teacher is None) != (losses.distillation is None):
        raise RunError(
            "distillation needs a teacher, and a teacher is for distillation: pass both (--teacher "
            "MODEL under --recipe uptrain, or with --distillation 0.5)."
        )
    if teacher is None:
        return
    if teacher is model:
        raise RunError("the teacher is the model itself: load the original beside it.")
    shared = {name: getattr(training, name) for name in ("dp_shard", "cp", "sp")}
    taken = [f"{name}={size}" for name, size in shared.items() if size > 1]
    if taken:
        raise RunError(
            f"a teacher and {', '.join(taken)}: each process needs whole rows and a whole teacher. "
            "Leave distillation out, or train on one process for each row."
        )
    sizes = [int(text_config(one).vocab_size) for one in (teacher, model)]
    if sizes[0] != sizes[1]:
        raise RunError(
            f"the teacher has {sizes[0]:,} tokens and the model {sizes[1]:,}: expected the "
            "checkpoint that the model was made from."
        )


@contextmanager
def frozen(model: PreTrainedModel, weights: TrainedWeights) -> Generator[None]:
    """Train those weights alone inside the block.

    Raises:
        RunError: an unknown choice.
    """
    if weights not in get_args(TrainedWeights):
        raise RunError(f"weights={weights!r}: expected {', '.join(get_args(TrainedWeights))}.")
    if weights == "all":
        yield
        return
    trained = {id(p) for module in _trained(model, weights) for p in module.parameters()}
    if not trained:
        raise RunError(
            f"weights={weights!r} (--trained-weights): the model has none beside those of its "
            "family: train all, or the attention."
        )
    still = [p for p in model.parameters() if id(p) not in trained and p.requires_grad]
    for parameter in still:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)


def _trained(model: PreTrainedModel, weights: TrainedWeights) -> list[nn.Module]:
    modules = [module for _, module, _ in attention_modules(model)]
    if weights == "attention":
        return modules
    rules = [getattr(module, ATTRIBUTE, None) for module in modules]
    return [rule for rule in rules if isinstance(rule, nn.Module)]


@contextmanager
def listening(teacher: PreTrainedModel, *, packed: bool) -> Generator[None]:
    """Inside the block, the teacher without dropout, keeping documents apart as the model does."""
    with evaluating(teacher), packed_attention(teacher) if packed else nullcontext():
        yield
