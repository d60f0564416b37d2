"""Bytes that an optimizer keeps for each trained number, and what one update of it needs.

Kingma & Ba 2015 keep two moments (Adam), Chen et al. 2023 one (Lion); in 8 bits a block of 256
numbers shares a float32 scale (Dettmers et al. 2022, arXiv:2110.02861, section 2), and transformers
leaves embeddings at 32 bits under bitsandbytes (`Trainer.create_optimizer`).
"""

from __future__ import annotations

from dataclasses import dataclass

from longctx.errors import RunError, nearest

__all__ = ["OPTIMIZERS", "Optimizer", "optimizer_of"]

_SCALE = 4 / 256  # bytes of a block's scale for each number in it


@dataclass(frozen=True, slots=True)
class Optimizer:
    """Memory of an optimizer of transformers' `optim`."""

    state: float
    """Bytes kept for each trained number."""
    embedding: float
    """The same for numbers of the embedding."""
    whole: float = 0.0
    """Bytes for each trained number at once during an update on a GPU."""
    largest: float = 8.0
    """Bytes for each number of the largest tensor during an update, where tensors take turns."""


OPTIMIZERS: dict[str, Optimizer] = {
    # torch's multi-tensor AdamW makes the square roots of all second moments at once
    # (torch/optim/adam.py, _multi_tensor_adam); tensor by tensor: the root, and that divided.
    "adamw_torch": Optimizer(8, 8, whole=4),
    "adamw_torch_fused": Optimizer(8, 8, largest=0),
    "adamw_8bit": Optimizer(2 + 2 * _SCALE, 8, largest=0),
    "adamw_bnb_8bit": Optimizer(2 + 2 * _SCALE, 8, largest=0),
    "adamw_torch_8bit": Optimizer(2 + 2 * _SCALE, 2 + 2 * _SCALE),
    "lion_32bit": Optimizer(4, 4, largest=0),
    "lion_8bit": Optimizer(1 + _SCALE, 4, largest=0),
    "adafactor": Optimizer(0, 0),
    "rmsprop": Optimizer(4, 4, whole=4),
    "adagrad": Optimizer(4, 4, whole=4),
    "sgd": Optimizer(0, 0, largest=0),
}


def optimizer_of(name: str) -> Optimizer:
    """An optimizer by transformers' name for it.

    Raises:
        RunError: one whose memory is not known here.
    """
    if name not in OPTIMIZERS:
        raise RunError(
            f"optimizer={name!r}{nearest(name, OPTIMIZERS)}: expected one whose memory is known, "
            f"{', '.join(OPTIMIZERS)}."
        )
    return OPTIMIZERS[name]
