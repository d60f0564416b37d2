"""What a memory plan is made for: the model's training settings and the hardware."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from longctx.errors import RunError

from ..config import GradientCheckpointing
from .optimizers import optimizer_of

__all__ = ["PlanSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What is to be trained on what; names and defaults are those of `longctx train`."""

    max_length: int
    """Tokens of a row."""
    batch_size: int = 1
    """Rows per forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per update; gradients wait from one to the next."""
    gpus: int = 1
    """Processes, each with a GPU of its own."""
    memory: float = 80.0
    """GiB of each GPU."""
    reserve: float = 1.5
    """GiB of each GPU for the CUDA context, kernels' workspaces and the allocator's fragments: an
    allowance, not a prediction."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What it runs on; a CPU holds offloaded activations itself."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What matrix products compute in, by autocast, and what a frozen base is held in."""
    lora_r: int = 0
    """Rank of LoRA adapters; 0 for all weights."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the adapted linear layers; none for those of the attention."""
    norms: bool = False
    """With adapters, norms are trained whole (LongLoRA)."""
    embeddings: bool = False
    """With adapters, embeddings are trained whole (LongLoRA), and a head tied to them."""
    optimizer: str = "adamw_torch"
    """Of transformers' `optim`."""
    gradient_checkpointing: GradientCheckpointing = "none"
    """All activations are kept, or the layers' inputs, or those in the CPU's memory."""
    loss: Literal["chunked", "plain"] = "chunked"
    """Without [S, vocab] logits, as `longctx train` does, or with them, as transformers does."""
    pack: bool = True
    """Several documents to a row, kept apart by attention."""
    dp_shard: int = 1
    """Processes that share the weights (FSDP2)."""
    cp: int = 1
    """Processes that share a sequence by ring attention, and the weights with it."""
    sp: int = 1
    """Processes that share a sequence by exchanging heads; all processes then share the optimizer's
    states (ZeRO 1), and none the weights."""

    @property
    def half_base(self) -> bool:
        """Whether the weights are held in `dtype`: `longctx train` trains no part of them whole."""
        return self.lora_r > 0 and not (self.norms or self.embeddings)

    def __post_init__(self) -> None:
        for name in (
            "max_length",
            "batch_size",
            "gradient_accumulation_steps",
            "gpus",
            "dp_shard",
            "cp",
            "sp",
        ):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise RunError(f"{name}={value!r}: expected a whole number, 1 or more.")
        if type(self.lora_r) is not int or self.lora_r < 0:
            raise RunError(f"lora_r={self.lora_r!r}: expected a rank, or 0 for all weights.")
        if not 0 <= self.reserve < self.memory < math.inf:
            raise RunError(
                f"memory={self.memory}, reserve={self.reserve}: expected GiB of each GPU, above 0, "
                "and the part of it that is not ours, 0 or more and less than that."
            )
        known = {
            "device": ("cuda", "cpu"),
            "dtype": ("bfloat16", "float32"),
            "gradient_checkpointing": get_args(GradientCheckpointing),
            "loss": ("chunked", "plain"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise RunError(f"{name}={getattr(self, name)!r}: expected {', '.join(values)}.")
        optimizer_of(self.optimizer)
        if (self.norms or self.embeddings) and not self.lora_r:
            raise RunError("norms and embeddings go with adapters: pass lora_r too.")
        if self.gpus % (self.dp_shard * self.cp * self.sp):
            raise RunError(
                f"gpus={self.gpus} is not a multiple of dp_shard·cp·sp = {self.dp_shard}·{self.cp}·"
                f"{self.sp} = {self.dp_shard * self.cp * self.sp}: choose sizes whose product "
                "divides it."
            )
        if self.cp > 1 and self.dp_shard == 1 and self.gpus > self.cp * self.sp:
            raise RunError(
                f"cp={self.cp} on gpus={self.gpus}: those with rows of their own share weights, so "
                f"pass dp_shard={self.gpus // (self.cp * self.sp)}."
            )
