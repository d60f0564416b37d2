"""What makes a plan fit that does not, with least harm, and the command line for it.

    advice = advise("meta-llama/Llama-3.1-8B", PlanSettings(max_length=16_384))
    advice.fits, advice.changes, advice.command

Measures are tried one after the other, each on top of those before: first those that leave every
update as it was, from the cheapest to the slowest, then those that change what is learnt. Once it
fits, those that it fits without are taken back.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from longctx.errors import RunError

from .model_spec import ModelSpec
from .plan_settings import PlanSettings
from .planner import MemoryPlan, plan

__all__ = ["Advice", "Measure", "advise"]

RANK = 16
"""Of recommended adapters."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A change of settings."""

    name: str
    """What it is, and what it costs."""
    changes: dict[str, Any]
    """Fields of the settings and their new values."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What was asked for, and what to do instead."""

    asked: MemoryPlan
    """The plan of the settings that were asked for."""
    found: MemoryPlan
    """The same if it fits, else the one that does with least harm, else the smallest."""
    measures: tuple[Measure, ...]
    """What leads from one to the other."""

    @property
    def fits(self) -> bool:
        """Whether the found plan does."""
        return self.found.fits

    @property
    def command(self) -> str:
        """The command line that trains so; data and output are to be filled in."""
        s, spec = self.found.settings, self.found.spec
        extends = spec.window is not None and s.max_length > spec.window
        words = ["longctx", "train", spec.name]
        words += ["--method", f"yarn:target={s.max_length}" if extends else "none"]
        words += ["--data", "FILE", "--max-length", str(s.max_length), "--output-dir", "DIR"]
        words += ["--lora-r", str(s.lora_r)]
        words += ["--lora-target-modules", *s.lora_target_modules] if s.lora_target_modules else []
        words += ["--gradient-checkpointing", s.gradient_checkpointing, "--optimizer", s.optimizer]
        flags = {"norms": s.norms, "embeddings": s.embeddings, "no-pack": not s.pack}
        # No process of them has the whole model that an evaluation needs.
        flags["evaluate"] = s.dp_shard * s.cp > 1
        words += [f"--{flag}" for flag, on in flags.items() if on]
        for name in ("batch_size", "gradient_accumulation_steps", "dp_shard", "cp", "sp"):
            words += [f"--{name.replace('_', '-')}", str(getattr(s, name))]
        if s.gpus > 1:
            launcher = f"torchrun --standalone --nproc-per-node {s.gpus} --no-python"
            words = [*launcher.split(), *words]
        return shlex.join(words)

    def __str__(self) -> str:
        s = self.asked.settings
        if not self.measures:
            return f"It fits: {self.found}" if self.fits else f"It does not fit: {self.found}"
        steps = "\n".join(f"  - {measure.name}" for measure in self.measures)
        if self.fits:
            return f"It does not fit as asked: {self.asked}\nIt does with\n{steps}\n{self.found}"
        return (
            f"Nothing makes it fit. As asked: {self.asked}\nAt best, with\n{steps}\n{self.found}\n"
            f"It lacks {-self.found.margin:.2f} GiB on each of {s.gpus} GPUs: shorten max_length, "
            "or take more or larger GPUs."
        )


def advise(
    source: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel | ModelSpec,
    settings: PlanSettings,
) -> Advice:
    """Plan, and find what makes it fit.

    Args:
        source: a model, its config, or what `longctx.load` takes, of which only the config is read.
        settings: what is to be trained on what.

    Raises:
        ModelError: a model whose memory is not known.
        RunError: settings that do not go together.
    """
    spec = source if isinstance(source, ModelSpec) else ModelSpec.of(source)
    asked = plan(spec, settings)
    taken: list[Measure] = []
    found = smallest = asked
    least: list[Measure] = []
    for measure in _measures(spec, settings):
        if found.fits:
            break
        taken.append(measure)
        found = plan(spec, _with(settings, taken))
        if found.total < smallest.total:
            smallest, least = found, list(taken)
    if not found.fits:
        found, taken = smallest, least
    # The harmful ones first: without one of them it may still fit, or be no larger.
    for measure in reversed(taken.copy()):
        if "loss" in measure.changes:  # it is what `longctx train` does
            continue
        rest = [other for other in taken if other is not measure]
        without = plan(spec, _with(settings, rest))
        if without.fits or (not found.fits and without.total <= found.total):
            found, taken = without, rest
    return Advice(asked, found, tuple(taken))


def _with(settings: PlanSettings, measures: list[Measure]) -> PlanSettings:
    changes: dict[str, Any] = {}
    for measure in measures:
        changes |= measure.changes
    return replace(settings, **changes)


def _measures(spec: ModelSpec, settings: PlanSettings) -> Iterator[Measure]:
    s = settings
    if s.loss == "plain":
        yield Measure("the chunked loss, which costs nothing", {"loss": "chunked"})
    if s.batch_size > 1:
        rows = {
            "batch_size": 1,
            "gradient_accumulation_steps": s.gradient_accumulation_steps * s.batch_size,
        }
        yield Measure("one row at a time, accumulated to the same update", rows)
    whole = s.gpus // (s.cp * s.sp)
    if whole > s.dp_shard and s.sp == 1:
        name = f"weights, gradients and states over {whole} GPUs (FSDP), at the cost of traffic"
        yield Measure(name, {"dp_shard": whole})
    if s.gradient_checkpointing == "none":
        name = (
            "layers made again in backward (--gradient-checkpointing layers): one more forward pass"
        )
        yield Measure(name, {"gradient_checkpointing": "layers"})
    if s.gradient_checkpointing != "offload" and s.device == "cuda":
        name = "layers made again from inputs in the CPU's memory: another pass, and copies"
        yield Measure(name, {"gradient_checkpointing": "offload"})
    yield from _shared_sequences(spec, s)
    if s.optimizer.startswith("adamw_torch"):
        name = "AdamW's states in 8 bits (bitsandbytes), which changes updates a little"
        yield Measure(name, {"optimizer": "adamw_8bit"})
    if not s.lora_r:
        changes = {"lora_r": RANK, "norms": True, "embeddings": True}
        name = f"LoRA of rank {RANK} with embeddings and norms (LongLoRA) instead of all weights"
        yield Measure(name, changes)
    if s.embeddings or not s.lora_r:
        name = "frozen embeddings and norms: adapters alone learn long texts less well"
        yield Measure(name, {"norms": False, "embeddings": False})


def _shared_sequences(spec: ModelSpec, settings: PlanSettings) -> Iterator[Measure]:
    """Each sequence over more GPUs, by exchanged heads where that is asked for, else by ring."""
    s = settings
    name = "sp" if s.sp > 1 else "cp"
    for size in range(getattr(s, name) + 1, s.gpus + 1):
        shards = 1 if name == "sp" else s.gpus // size
        changes = {name: size, "dp_shard": shards, "pack": False}
        if s.gpus % size or s.max_length < 2 * size:
            continue
        measure = Measure(
            f"each sequence over {size} GPUs ({name}): no packed rows, and as many times fewer at "
            "once",
            changes,
        )
        try:
            plan(spec, _with(s, [measure]))
        except RunError:  # heads that cannot be shared out so
            continue
        yield measure
