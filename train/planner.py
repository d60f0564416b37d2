"""Predict the memory of one update of fine-tuning, by part, before anything is loaded.

    found = plan("meta-llama/Llama-3.1-8B", PlanSettings(max_length=16_384, gpus=8, dp_shard=8))
    found.total, found.fits, print(found)

An update passes through moments that each need something else: the loss, backward in the last layer
and in the first, the embedding's gradient, the optimizer. Every part is counted at every moment
(`moments.py`), and the plan is the largest of these sums, in an update in which the optimizer has
its states already. Training holds weights in float32 and computes under bfloat16 autocast; a base
that only carries adapters is in bfloat16. `benchmarks/planner.py` compares with measured peaks.
What no formula knows, the CUDA context and fragments of the allocator, is `PlanSettings.reserve`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, get_args

from rich.table import Table
from transformers import PreTrainedConfig, PreTrainedModel

from longctx.errors import RunError

from .anatomy import Anatomy
from .contract import Setup, check_contract
from .moments import PARTS, Moment, moments_of
from .optimizers import optimizer_of
from .settings import Checkpointing

__all__ = ["MemoryPlan", "Moment", "PlanSettings", "plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What is to be trained on what; names and defaults are those of `longctx train`."""

    max_length: int
    """Tokens of a row."""
    batch_size: int = 1
    """Rows per forward pass."""
    accumulate: int = 1
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
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 for all weights."""
    lora_targets: tuple[str, ...] = ()
    """Names of the adapted linear layers; none for those of the attention."""
    norms: bool = False
    """With adapters, norms are trained whole (LongLoRA)."""
    embeddings: bool = False
    """With adapters, embeddings are trained whole (LongLoRA), and a head tied to them."""
    optimizer: str = "adamw_torch"
    """Of transformers' `optim`."""
    checkpointing: Checkpointing = "none"
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
        return self.lora_rank > 0 and not (self.norms or self.embeddings)

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_size", "accumulate", "gpus", "dp_shard", "cp", "sp"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise RunError(f"{name}={value!r}: expected a whole number, 1 or more.")
        if type(self.lora_rank) is not int or self.lora_rank < 0:
            raise RunError(f"lora_rank={self.lora_rank!r}: expected a rank, or 0 for all weights.")
        if not 0 <= self.reserve < self.memory < math.inf:
            raise RunError(
                f"memory={self.memory}, reserve={self.reserve}: expected GiB of each GPU, above 0, "
                "and the part of it that is not ours, 0 or more and less than that."
            )
        known = {
            "device": ("cuda", "cpu"),
            "dtype": ("bfloat16", "float32"),
            "checkpointing": get_args(Checkpointing),
            "loss": ("chunked", "plain"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise RunError(f"{name}={getattr(self, name)!r}: expected {', '.join(values)}.")
        optimizer_of(self.optimizer)
        if (self.norms or self.embeddings) and not self.lora_rank:
            raise RunError("norms and embeddings go with adapters: pass lora_rank too.")
        if self.gpus % (self.dp_shard * self.cp * self.sp):
            raise RunError(
                f"gpus={self.gpus} is no multiple of dp_shard·cp·sp = {self.dp_shard}·{self.cp}·"
                f"{self.sp} = {self.dp_shard * self.cp * self.sp}: choose sizes whose product "
                "divides it."
            )
        if self.cp > 1 and self.dp_shard == 1 and self.gpus > self.cp * self.sp:
            raise RunError(
                f"cp={self.cp} on gpus={self.gpus}: those with rows of their own share weights, so "
                f"pass dp_shard={self.gpus // (self.cp * self.sp)}."
            )


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of one update."""

    settings: PlanSettings
    anatomy: Anatomy
    moments: tuple[Moment, ...]
    """In the order in which they come."""

    @property
    def peak(self) -> Moment:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def total(self) -> float:
        """GiB per GPU at the peak, without the reserve."""
        return self.peak.total

    @property
    def host(self) -> float:
        """GiB of the CPU's memory that each process's offloaded activations take."""
        return self.moments[0].host

    @property
    def margin(self) -> float:
        """GiB that are left of each GPU; below 0 where it does not fit."""
        return self.settings.memory - self.settings.reserve - self.total

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.margin >= 0

    def __str__(self) -> str:
        parts = ((text, getattr(self.peak, part)) for part, text in PARTS.items())
        shown = ", ".join(f"{text} {size:.2f}" for text, size in parts if size)
        return (
            f"{self.total:.2f} GiB per GPU at the peak ({self.peak.name}: {shown}) and "
            f"{self.settings.reserve:g} in reserve, {abs(self.margin):.2f} "
            f"{'less' if self.fits else 'more'} than the {self.settings.memory:g} there are."
        )

    def table(self) -> Table:
        """Parts by moments, for rich."""
        table = Table("GiB per GPU", box=None, padding=(0, 2, 0, 0))
        for moment in self.moments:
            table.add_column(
                moment.name, justify="right", style="bold" if moment is self.peak else ""
            )
        for part, text in PARTS.items():
            values = [getattr(moment, part) for moment in self.moments]
            if any(values):
                table.add_row(text, *(f"{v:.2f}" if v else "" for v in values))
        table.add_row("together", *(f"{moment.total:.2f}" for moment in self.moments))
        return table


def plan(
    source: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel | Anatomy,
    settings: PlanSettings,
) -> MemoryPlan:
    """Predict.

    Args:
        source: a model, its config, or what `longctx.load` takes, of which only the config is read.
        settings: what is to be trained on what.

    Raises:
        ModelError: a model whose memory is not known.
        RunError: settings that do not go together.
    """
    anatomy = source if isinstance(source, Anatomy) else Anatomy.of(source)
    check_contract(
        Setup(
            heads=anatomy.heads,
            kv_heads=anatomy.kv_heads,
            context_parallel=settings.cp,
            sequence_parallel=settings.sp,
            packed=settings.pack,
            sliding=anatomy.sliding,
            fully_sharded=settings.dp_shard * settings.cp > 1,
            attention="flash_attention_2" if settings.sp > 1 else "sdpa",
        )
    )
    return MemoryPlan(settings, anatomy, moments_of(anatomy, settings))
