"""The command that predicts: `longctx plan`."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import Any, Literal

from tyro.conf import Positional

__all__ = ["COMMAND", "Plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    r"""Predict the memory of fine-tuning, or the cost to serve.

    Exit code 1 if nothing does. Reads the model's config only: no weights, no code. Prints what
    each moment of an update holds on each GPU and, where that is too much, what helps with least
    harm, with the command line for it. Options are those of `longctx train`.

    With --serve: weights and key/value cache, the longest rows that fit, the bytes that a token
    reads and so the most tokens per second, the FLOPs of a prompt and so the least time to the
    first token.

    Examples:
        longctx plan meta-llama/Llama-3.1-8B --max-length 16384 --gpus 8 --memory 80
        longctx plan smollm2 --max-length 16384 --memory 24 --gradient-checkpointing layers
        longctx plan mistralai/Mistral-7B-v0.3 --max-length 32768 --memory 48 \
            --lora-r 16 --norms --embeddings --gradient-checkpointing layers
        longctx plan demo --max-length 2048 --memory 8 --loss plain
        longctx plan smollm2 --serve --memory 24 --bandwidth 936 --tflops 71
        longctx plan smollm2 --serve --method sink_window:window=1020 --device cpu --measure
    """

    model: Positional[str]
    """Checkpoint folder, hub id, GGUF file, or "demo"."""
    max_length: int | None = None
    """Tokens of a row; with --serve by default the window."""
    batch_size: int = 1
    """Rows per process and forward pass, or served at once."""
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
    serve: bool = False
    """Plan for serving the model instead."""
    method: str | None = None
    """With --serve: NAME:field=value,…, with a "+" between several that go on top of each other:
    some extend the window, some bound the cache."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "float8"] = "auto"
    """With --serve: what keys and values are held in; auto is as the weights."""
    bandwidth: float | None = None
    """With --serve: GB/s that the device reads from its memory."""
    tflops: float | None = None
    """With --serve: TFLOP/s of its matrix products."""
    measure: bool = False
    """With --serve: measure both here, in two seconds."""

    def run(self) -> int:
        """Plan, print and advise."""
        from rich.console import Console

        from ..errors import RunError

        given = [n for n in _SERVING if getattr(self, n) not in (None, False, "auto")]
        if self.serve:
            return self._serve()
        if given:
            raise RunError(f"--{given[0].replace('_', '-')} is for --serve: pass that too.")
        if self.max_length is None:
            raise RunError("--max-length is missing: the tokens of a row.")

        from longctx.train.memory.advice import advise
        from longctx.train.memory.plan_settings import PlanSettings

        from ..errors import printable

        names = {field.name for field in fields(self)} - {"model", "serve", *_SERVING}
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

    def _serve(self) -> int:
        """Print what it costs to serve."""
        from dataclasses import replace

        import torch
        from rich.console import Console

        from longctx.train.memory.machine import measure_machine
        from longctx.train.memory.model_spec import read_config
        from longctx.train.memory.serving import ServingSettings, plan_serving

        from ..errors import RunError, printable

        odd = [f.name for f in fields(self) if f.name not in _SERVED and _changed(self, f)]
        if odd:
            raise RunError(f"--{odd[0].replace('_', '-')} is for training: leave --serve out.")
        auto = "bfloat16" if self.device == "cuda" else "float32"
        settings = ServingSettings(
            max_length=self.max_length,
            batch_size=self.batch_size,
            method=self.method or "none",
            memory=self.memory,
            reserve=self.reserve,
            dtype=auto if self.dtype == "auto" else self.dtype,
            cache_dtype=None if self.cache_dtype == "auto" else self.cache_dtype,
            bandwidth=self.bandwidth,
            tflops=self.tflops,
        )
        config = read_config(self.model)
        found = plan_serving(config, settings)
        source = "predicted; bandwidth and TFLOP/s as given"
        if self.measure:
            if self.device == "cuda" and not torch.cuda.is_available():
                raise RunError("--measure: there is no GPU here; pass --device cpu.")
            machine = measure_machine(self.device, getattr(torch, settings.dtype))
            speed = {
                "bandwidth": self.bandwidth or machine.bandwidth,
                "tflops": self.tflops or machine.tflops,
            }
            found = replace(found, settings=replace(settings, **speed))
            source = f"predicted from what was {machine}"
        console = Console(highlight=False)
        method = f" under {settings.method}" if self.method else ""
        beyond = found.window is not None and found.length > found.window
        console.print(f"{printable(self.model)}{printable(method)}: {found}", markup=False)
        if beyond:
            console.print(f"The model's window is {found.window:,} tokens: extend it for more.")
        console.print()
        console.print(found.table("rows"))
        console.print(f"\n{source}; cache and weights from the config, exactly.", markup=False)
        heads = found.heads_table(config)
        if heads is not None:
            console.print("\nWith fewer key/value heads (longctx convert --to multi_query:N)\n")
            console.print(heads)
        return 0 if found.fits else 1


_SERVING = ("method", "cache_dtype", "bandwidth", "tflops", "measure")
"""Options of --serve alone."""
_SERVED = (
    *("model", "max_length", "batch_size", "memory", "reserve", "device", "dtype", "serve"),
    *_SERVING,
)
"""Options that --serve takes."""


def _changed(plan: Plan, field: Field[Any]) -> bool:
    return getattr(plan, field.name) != field.default


COMMAND = Plan
