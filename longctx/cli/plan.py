"""The command that predicts: `longctx plan`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from tyro.conf import Positional

__all__ = ["COMMAND", "Plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    r"""Predict the memory of fine-tuning, and find what makes it fit.

    Exit code 1 if nothing does. Reads the model's config only: no weights, no code. Prints what
    each moment of an update holds on each GPU and, where that is too much, what helps with least
    harm, with the command line for it. Options are those of `longctx train`.

    Examples:
        longctx plan meta-llama/Llama-3.1-8B --max-length 16384 --gpus 8 --memory 80
        longctx plan smollm2 --max-length 16384 --memory 24 --gradient-checkpointing layers
        longctx plan mistralai/Mistral-7B-v0.3 --max-length 32768 --memory 48 \
            --lora-r 16 --norms --embeddings --gradient-checkpointing layers
        longctx plan demo --max-length 2048 --memory 8 --loss plain
    """

    model: Positional[str]
    """Checkpoint folder, hub id, GGUF file, or "demo"."""
    max_length: int
    """Tokens of a row."""
    batch_size: int = 1
    """Rows per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per update."""
    gpus: int = 1
    """Processes, each with a GPU of its own."""
    memory: float = 80.0
    """GiB of each GPU."""
    reserve: float = 1.5
    """GiB of each that the CUDA context, kernels and the allocator's fragments take."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What it runs on."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What products compute in, as in training by default: bfloat16 on CUDA, float32 on a CPU. Full
    training keeps its weights in float32."""
    lora_r: int = 0
    """Train LoRA adapters of this rank; 0 for all weights."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the linear layers with adapters; default: those of the attention."""
    norms: bool = False
    """With adapters, train the norms whole."""
    embeddings: bool = False
    """With adapters, train the embeddings whole."""
    optimizer: str = "adamw_torch"
    """As transformers' `optim`: adamw_torch, adamw_8bit, sgd, …"""
    gradient_checkpointing: Literal["none", "layers", "offload"] = "none"
    """Keep activations, make them again layer by layer, or that with inputs in CPU memory."""
    loss: Literal["chunked", "plain"] = "chunked"
    """As `longctx train` makes it, or with whole logits, as transformers does."""
    pack: bool = True
    """Several documents to a row, kept apart by attention."""
    dp_shard: int = 1
    """Processes that share the weights (FSDP2)."""
    cp: int = 1
    """Processes that share a sequence by ring attention."""
    sp: int = 1
    """Processes that share a sequence by exchanging heads."""

    def run(self) -> int:
        """Plan, print and advise."""
        from rich.console import Console

        from longctx.train.memory.advice import advise
        from longctx.train.memory.plan_settings import PlanSettings

        from ..errors import printable

        names = {field.name for field in fields(self)} - {"model"}
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.dtype == "auto":
            settings["dtype"] = "bfloat16" if self.device == "cuda" else "float32"
        advice = advise(self.model, PlanSettings(**settings))
        console = Console(highlight=False)
        console.print(advice.asked.table())
        if advice.measures:
            console.print("\nand with the measures below")
            console.print(advice.found.table())
        console.print(f"\n{printable(advice)}", soft_wrap=True, markup=False)
        if advice.found.host:
            console.print(f"{advice.found.host:.2f} GiB of the CPU's memory for each process.")
        if advice.fits:
            console.print(f"\n{printable(advice.command)}", soft_wrap=True, markup=False)
        return 0 if advice.fits else 1


COMMAND = Plan
