"""Predict the memory of one update of fine-tuning, by part, before anything is loaded.

    found = plan("meta-llama/Llama-3.1-8B", PlanSettings(max_length=16_384, gpus=8, dp_shard=8))
    found.total, found.fits, print(found)

An update passes through moments that each need something else: the loss, backward in the last layer
and in the first, the embedding's gradient, the optimizer. Every part is counted at every moment
(`timeline.py`), and the plan is the largest of these sums, in an update in which the optimizer has
its states already. Training holds weights in float32 and computes under bfloat16 autocast; a base
that only carries adapters is in bfloat16. `benchmarks/planner.py` compares with measured peaks.
What no formula knows, the CUDA context and fragments of the allocator, is `PlanSettings.reserve`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from rich.table import Table
from transformers import PreTrainedConfig, PreTrainedModel

from ..parallel.compatibility import Setup, check_compatibility
from .model_spec import ModelSpec
from .plan_settings import PlanSettings
from .timeline import PARTS, Moment, timeline_of

__all__ = ["MemoryPlan", "plan"]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of one update."""

    settings: PlanSettings
    spec: ModelSpec
    timeline: tuple[Moment, ...]
    """In the order in which they come."""

    @property
    def peak(self) -> Moment:
        """The moment that needs most."""
        return max(self.timeline, key=lambda moment: moment.total)

    @property
    def total(self) -> float:
        """GiB per GPU at the peak, without the reserve."""
        return self.peak.total

    @property
    def host(self) -> float:
        """GiB of the CPU's memory that each process's offloaded activations take."""
        return self.timeline[0].host

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
        for moment in self.timeline:
            table.add_column(
                moment.name, justify="right", style="bold" if moment is self.peak else ""
            )
        for part, text in PARTS.items():
            values = [getattr(moment, part) for moment in self.timeline]
            if any(values):
                table.add_row(text, *(f"{v:.2f}" if v else "" for v in values))
        table.add_row("together", *(f"{moment.total:.2f}" for moment in self.timeline))
        return table


def plan(
    source: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel | ModelSpec,
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
    spec = source if isinstance(source, ModelSpec) else ModelSpec.of(source)
    check_compatibility(
        Setup(
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            context_parallel=settings.cp,
            sequence_parallel=settings.sp,
            packed=settings.pack,
            sliding=spec.sliding,
            fully_sharded=settings.dp_shard * settings.cp > 1,
            attention="flash_attention_2" if settings.sp > 1 else "sdpa",
        )
    )
    return MemoryPlan(settings, spec, timeline_of(spec, settings))
