"""The settings of a training run, apart from model and data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from longctx.errors import RunError

__all__ = ["Gate", "GradientCheckpointing", "Schedule", "Training"]

GradientCheckpointing = Literal["none", "layers", "offload"]
Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, slots=True)
class Training:
    """How long, how fast and on what machines."""

    max_steps: int | None = None
    """Updates; None for as many as the epochs take."""
    epochs: float = 1.0
    """Passes over the data, where no `max_steps` are given."""
    batch_size: int = 1
    """Rows per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per update."""
    learning_rate: float = 2e-5
    """Peak."""
    warmup: int = 20
    """Updates until the peak is reached."""
    schedule: Schedule = "cosine"
    """How the learning rate falls from its peak: to 0 along a cosine or a line, or not at all. It
    gets there in `warmup` updates in any case."""
    weight_decay: float = 0.0
    """On matrices; norms and biases are never decayed."""
    beta2: float = 0.95
    """Of Adam."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 for never."""
    optimizer: str = "adamw_torch"
    """Any name that transformers' `optim` takes: adamw_torch, adamw_8bit, sgd, …"""
    gradient_checkpointing: GradientCheckpointing = "none"
    """Activations are kept ("none"), made again layer by layer in backward ("layers"), with the
    layers' inputs waiting in the CPU's memory ("offload")."""
    seed: int = 0
    """Chooses the order of rows, drawn positions and adapters' first weights."""
    save_every: int = 100
    """Updates between two checkpoints that a run can be resumed from."""
    save_total_limit: int = 2
    """Checkpoints kept, 2 or more: one survives while the next is being written."""
    evaluate_every: int | None = None
    """Updates between evaluations; None for before and after only."""
    report_to: tuple[str, ...] = ()
    """Trackers of transformers: tensorboard, wandb, trackio, …"""
    dp_shard: int = 1
    """Processes that share the weights (FSDP2)."""
    cp: int = 1
    """Processes that share a sequence by ring attention (context parallel)."""
    sp: int = 1
    """Processes that share a sequence by exchanging heads (DeepSpeed Ulysses)."""

    def __post_init__(self) -> None:
        least = {
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "save_every": 1,
            "save_total_limit": 2,
            "dp_shard": 1,
            "cp": 1,
            "sp": 1,
            "warmup": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise RunError(f"{name}={getattr(self, name)}: expected {low} or more.")
        for name in ("max_steps", "evaluate_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise RunError(f"{name}={getattr(self, name)}: expected 1 or more, or None.")
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise RunError(f"{name}={getattr(self, name)}: expected a number above 0.")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RunError(f"{name}={getattr(self, name)}: expected 0 or more.")
        if not 0 <= self.beta2 < 1:
            raise RunError(f"beta2={self.beta2}: expected a number from 0 to below 1.")
        if not 0 <= self.seed < 2**32:
            raise RunError(f"seed={self.seed}: expected a whole number from 0 to 2³² − 1.")
        for name, known in (
            ("gradient_checkpointing", GradientCheckpointing),
            ("schedule", Schedule),
        ):
            if getattr(self, name) not in get_args(known):
                raise RunError(
                    f"{name}={getattr(self, name)!r}: expected {', '.join(get_args(known))}."
                )

    def record(self) -> dict[str, Any]:
        """What makes a run another one, if it changes: not where it is told, kept or recomputed."""
        apart = ("save_every", "save_total_limit", "report_to", "gradient_checkpointing")
        return {name: value for name, value in asdict(self).items() if name not in apart}


@dataclass(frozen=True, slots=True)
class Gate:
    """What the evaluation during training decides."""

    short: str | None = None
    """Figure that must not get worse than before training: perplexity within the old window."""
    worse: float = 0.1
    """By which share it may."""
    action: Literal["stop", "warn"] = "stop"
    """What happens beyond: the run ends there and is saved, or a line is printed."""
    best: str | None = None
    """Figure by which the best checkpoint is chosen, higher is better unless it is a perplexity;
    None for the last checkpoint. Checkpoints are then written whenever it is measured
    (`evaluate_every`), and not every `save_every` updates."""

    def __post_init__(self) -> None:
        if not 0 <= self.worse < math.inf:
            raise RunError(f"worse={self.worse} (--gate): expected a share, 0 or more.")

    @staticmethod
    def falls(figure: str) -> bool:
        """Whether a figure is better when it is lower."""
        return figure.startswith(("perplexity", "nll"))
