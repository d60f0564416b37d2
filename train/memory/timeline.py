"""The moments of one update and what is held at each, part by part.

Weights and gradients of full training are float32, as its masters are; autocast keeps a copy of
every matrix that it reads from where the forward pass first does until backward is through with it,
or until the forward pass ends if the layers are made again. A base that only carries adapters is
held in what products compute in, all else in float32; peft holds what is trained whole twice.
Sharded (FSDP2; Zhao et al. 2023, arXiv:2304.11277, and Rajbhandari et al. 2020, ZeRO,
arXiv:1910.02054, section 5), each process keeps its part of weights, gradients and states, gathers
in `dtype` the embedding and head, the layer at hand and the next, and adds gradients up in float32
(`parallel/fsdp.py`). DDP's buckets are as large as all gradients (torch's
`gradient_as_bucket_view`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longctx.errors import RunError

from .activations import (
    FLOAT,
    PrecisionPolicy,
    attention_backward,
    layer_backward,
    loss_bytes,
    outside,
    saved,
)
from .model_spec import ModelSpec
from .optimizers import optimizer_of

if TYPE_CHECKING:
    from .plan_settings import PlanSettings

__all__ = ["PARTS", "Moment", "precision_policy_of", "timeline_of"]

GIB = 2**30
_NORM = 6
"""Hidden states that backward through the final norm passes through, while all is still kept."""

PARTS = {
    "weights": "weights",
    "copies": "copies of weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations kept",
    "layer": "one layer's backward",
    "loss": "loss",
}
"""Fields of a `Moment`, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What is held at one moment of an update, in GiB per GPU."""

    name: str
    weights: float = 0.0
    """As they are held: float32, or a frozen base in half precision."""
    copies: float = 0.0
    """Of weights: autocast's, and those that FSDP gathers."""
    gradients: float = 0.0
    """In float32, with DDP's buckets."""
    optimizer: float = 0.0
    """States, and what the update itself needs."""
    activations: float = 0.0
    """Kept for backward: all, or the layers' inputs."""
    layer: float = 0.0
    """What one layer makes again, and passes through in backward."""
    loss: float = 0.0
    """Logits and what else the loss needs."""
    host: float = 0.0
    """Of the CPU's memory, by offloaded activations: not part of the total."""

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(getattr(self, part) for part in PARTS)


@dataclass(frozen=True, slots=True)
class _Trained:
    """Numbers that are trained."""

    all: int
    embedding: int
    """Those in the embedding."""
    largest: int
    """Those in the largest tensor."""


def adapted_by(spec: ModelSpec, settings: PlanSettings) -> tuple[str, ...]:
    """Names of the linear layers with adapters.

    Raises:
        RunError: there are no such layers.
    """
    names = {x.name: x.block for x in spec.linears}
    if settings.lora_r and not {*names} >= {*settings.lora_target_modules}:
        raise RunError(
            f"lora_target_modules={settings.lora_target_modules}: expected linear layers of "
            f"{spec.name}, which has {', '.join(sorted(names))}."
        )
    return settings.lora_target_modules or tuple(
        n for n, block in names.items() if block == "attention"
    )


def precision_policy_of(spec: ModelSpec, settings: PlanSettings) -> PrecisionPolicy:
    """What the settings mean for activations.

    Raises:
        RunError: adapters on layers that the model does not have.
    """
    targets = adapted_by(spec, settings)
    lora, sharded = settings.lora_r > 0, settings.dp_shard * settings.cp > 1
    compute = 2 if settings.dtype == "bfloat16" else FLOAT
    return PrecisionPolicy(
        compute=compute,
        # FSDP hands float32 weights out in half precision, embeddings and norms among them.
        stream=compute if sharded or settings.half_base else FLOAT,
        casts=compute < FLOAT and not sharded,
        rank=settings.lora_r,
        targets=targets,
        norms=settings.norms or not lora,
        head=not lora or (settings.embeddings and not spec.head),
        packed=settings.pack,
    )


def timeline_of(spec: ModelSpec, settings: PlanSettings) -> tuple[Moment, ...]:
    """The moments of an update in the order in which they come.

    Raises:
        RunError: adapters on layers that the model does not have.
    """
    s, a, policy = settings, spec, precision_policy_of(spec, settings)
    trained, rule = _trained(a, s), optimizer_of(s.optimizer)
    shards, tokens = s.dp_shard * s.cp, s.batch_size * math.ceil(s.max_length / (s.cp * s.sp))
    sharded = shards > 1

    frozen = a.parameters if s.lora_r else 0
    held = policy.compute if s.half_base else FLOAT
    weights = (held * frozen + FLOAT * trained.all) / shards
    states = rule.state * (trained.all - trained.embedding) + rule.embedding * trained.embedding
    # ZeRO 1 shares states, and a copy of the weights that they belong to, over all.
    zero = s.sp > 1
    updated = s.gpus if zero else shards
    states = (states + FLOAT * trained.all * zero) / updated
    if s.device == "cuda":
        update = rule.whole * trained.all / updated
    else:
        update = rule.largest * trained.largest

    every_copy, one_copy, root_copy = 0.0, 0.0, 0.0
    gradient = (policy.compute + FLOAT) * (not s.lora_r)  # of what is gathered, before it is cut
    if sharded:
        root = a.embedding + a.head + a.rest
        every_copy = policy.compute * (root + 2 * a.layer)
        one_copy = every_copy + gradient * a.layer
        root_copy = (policy.compute + gradient) * root
    elif policy.half and not s.half_base:
        one_copy = policy.compute * sum(x.weights for x in a.linears)
        every_copy = one_copy * a.layers

    tied = a.head == 0
    gradients = FLOAT * trained.all / shards
    embedding = FLOAT * trained.embedding / shards
    own_layer = FLOAT * a.layer * (not s.lora_r) / shards
    of_head = (policy.compute if sharded else FLOAT) * a.vocabulary * a.hidden * policy.head
    buckets = FLOAT * trained.all if s.gpus > shards * s.sp and not sharded else 0.0
    waiting = buckets + (gradients if s.gradient_accumulation_steps > 1 else 0.0)
    # The gradient of a head that is tied to the embedding waits to be added to the other's.
    done = buckets + gradients + (of_head if s.gradient_accumulation_steps > 1 and tied else 0.0)

    row = policy.stream * a.hidden * tokens  # hidden states between two layers
    one = saved(a, policy) * tokens
    rest = outside(a, policy) * tokens
    keeps = s.gradient_checkpointing == "none"
    away = s.gradient_checkpointing == "offload" and s.device == "cuda"
    # A norm keeps a float32 input as it is: made again, a layer shares its input with what waited.
    again = 0.0 if keeps else one - (row if policy.stream == FLOAT else 0)
    first = one if keeps else row
    kept = row if away else a.layers * first
    passing = tokens * max(layer_backward(a, policy), attention_backward(a, policy, s.cp))
    forward, backward = loss_bytes(a, policy, tokens, plain=s.loss == "plain", gathered=sharded)

    held = {
        "weights": weights,
        "optimizer": states,
        "host": a.layers * row if away else 0.0,
    }
    parts: dict[str, dict[str, float]] = {
        "loss": {
            "copies": every_copy,
            "gradients": waiting + (of_head if s.loss == "chunked" else 0.0),
            "activations": kept + rest,
            "loss": max(forward, backward),
        },
        "last layer": {
            "copies": every_copy if keeps else one_copy,
            "gradients": waiting + of_head,
            "activations": kept + rest,
            "layer": max(again + passing, _NORM * row),
        },
        "first layer": {
            "copies": one_copy,
            "gradients": max(waiting, done - own_layer - (0.0 if tied else embedding)),
            "activations": first + rest,
            "layer": again + passing,
        },
        "embedding": {
            "copies": root_copy,
            "gradients": done + (embedding if tied else 0.0),
            "layer": row,
        },
        "update": {"gradients": buckets + gradients, "optimizer": states + update},
    }
    return tuple(
        Moment(name=name, **{part: size / GIB for part, size in (held | sizes).items()})
        for name, sizes in parts.items()
    )


def _trained(spec: ModelSpec, settings: PlanSettings) -> _Trained:
    if not settings.lora_r:
        return _Trained(spec.parameters, spec.embedding, spec.largest)
    adapted = [x for x in spec.linears if x.name in adapted_by(spec, settings)]
    rank = settings.lora_r
    adapters = spec.layers * sum(rank * (x.inputs + x.outputs) for x in adapted)
    embedding = spec.embedding * settings.embeddings
    norms = spec.norm_parameters * settings.norms
    largest = max([embedding, *(rank * max(x.inputs, x.outputs) for x in adapted)])
    return _Trained(adapters + embedding + norms, embedding, largest)
