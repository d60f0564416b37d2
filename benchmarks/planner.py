"""Predicted memory of an update against its measured peak: `python -m benchmarks.planner`.

Random LLaMAs of two sizes with SmolLM2's vocabulary, float32 on the CPU. Each setting runs in a
process of its own: a small model first, so that libraries have what they keep; then the model is
built and updated, on a few tokens first, so that the optimizer has its states. The peak is what the
process held at most beyond what it held before the model was built.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from longctx.train.engine.lora import Lora, add_lora
from longctx.train.loss.objective import Losses
from longctx.train.memory.plan_settings import PlanSettings
from longctx.train.memory.planner import MemoryPlan, plan
from longctx.train.parallel.before_transformers_5_23 import checkpoint_activations

from ._measure import peak_memory, write_results

FEW = 8  # tokens of the first update
RANK = 16


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of a model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 49_152

    @property
    def config(self) -> LlamaConfig:
        """As transformers says it."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=True,
        )


SMALL, SMOL = Size(384, 1024, 8, 6, 2), Size(576, 1536, 30, 9, 3)
NAMES = {SMALL: "32M", SMOL: "135M"}


@dataclass(frozen=True, slots=True)
class Case:
    """A setting that is measured."""

    size: Size
    tokens: int
    gradient_checkpointing: str = "none"
    lora: bool = False
    loss: str = "chunked"
    optimizer: str = "adamw_torch"

    def plan(self) -> MemoryPlan:
        """What is predicted for it."""
        settings: dict[str, Any] = {
            "gradient_checkpointing": self.gradient_checkpointing,
            "loss": self.loss,
        }
        settings |= {"lora_r": RANK * self.lora, "optimizer": self.optimizer}
        settings |= {"device": "cpu", "dtype": "float32", "pack": False}
        return plan(self.size.config, PlanSettings(max_length=self.tokens, **settings))


CASES = (
    Case(SMALL, 1024),
    Case(SMALL, 1024, loss="plain"),
    Case(SMALL, 4096, optimizer="sgd"),
    Case(SMALL, 4096, "layers", loss="plain", optimizer="sgd"),
    Case(SMALL, 8192, "layers"),
    Case(SMALL, 8192, lora=True),
    Case(SMOL, 1024),
    Case(SMOL, 1024, "layers", optimizer="sgd"),
    Case(SMOL, 1024, lora=True, loss="plain"),
    Case(SMOL, 4096, optimizer="sgd"),
    Case(SMOL, 4096, "layers", lora=True),
)


def train(case: Case) -> None:
    """Build a model and update it."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(case.size.config)
    whole: Any = add_lora(model, Lora(r=RANK)) if case.lora else model
    whole.train()
    if case.gradient_checkpointing != "none":
        checkpoint_activations(model, {"use_reentrant": False})
    trained = [p for p in whole.parameters() if p.requires_grad]
    adam = case.optimizer == "adamw_torch"
    optimizer = torch.optim.AdamW(trained) if adam else torch.optim.SGD(trained)
    ids = torch.randint(case.size.vocabulary, (1, case.tokens))
    for tokens in (FEW, case.tokens):
        _loss(model, ids[:, :tokens], plain=case.loss == "plain").backward()
        optimizer.step()
        optimizer.zero_grad()


def _loss(model: Any, ids: Tensor, *, plain: bool) -> Tensor:
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if plain:
        logits = functional.linear(hidden[0, :-1], model.lm_head.weight)
        return functional.cross_entropy(logits.float(), ids[0, 1:])
    return Losses()(hidden, model.lm_head.weight, ids).total


def _peaks(cases: Sequence[Case]) -> list[float]:
    for case in cases:
        train(replace(case, size=Size(64, 128, 2, 2, 1, vocabulary=256), tokens=256))
    return [peak_memory(partial(train, case)) for case in cases]


def measured(cases: Sequence[Case]) -> list[float]:
    """Peaks in MiB, measured one after the other in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peaks, cases).result()


def main() -> None:
    """Compare all settings."""
    rows = [_row(case) for case in CASES]
    ratios = sorted(float(row["ratio"]) for row in rows)
    write_results(
        "Planned memory against measured peaks",
        "python -m benchmarks.planner",
        rows,
        f"`longctx plan` in float32 on a CPU and the peak of an update whose optimizer has its "
        f"states, each setting in its own process; LoRA of rank {RANK} on the attention. Ratios "
        f"from {ratios[0]:.2f} to {ratios[-1]:.2f}.",
    )


def _row(case: Case) -> dict[str, str]:
    found = case.plan()
    peak = measured([case])[0]
    row = {
        "model": NAMES[case.size],
        "tokens": f"{case.tokens}",
        "activations": "kept" if case.gradient_checkpointing == "none" else "made again",
        "trained": "LoRA" if case.lora else "all",
        "loss": case.loss,
        "optimizer": "AdamW" if case.optimizer == "adamw_torch" else "SGD",
        "peak in": found.peak.name,
        "predicted MiB": f"{found.total * 1024:.0f}",
        "measured MiB": f"{peak:.0f}",
        "ratio": f"{found.total * 1024 / peak:.3f}",
    }
    print(" | ".join(row.values()), flush=True)
    return row


if __name__ == "__main__":
    main()
