"""LoRA of a random 7B-shaped LLaMA on long rows: memory against the plan, speed against TRL.

Both sides train a fresh model on the same rows in turns: longctx's trainer with what `longctx
train` would choose, and TRL's SFTTrainer with its own settings.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig

from longctx.train.memory.plan_settings import PlanSettings
from longctx.train.memory.planner import MemoryPlan, plan

from .._trainers import Clock, TokenRows, train_ours, train_theirs
from ._common import (
    DEVICE,
    ON_CUDA,
    Attempts,
    PartFailed,
    build_llama,
    free_memory,
    peak_gib,
    publish,
    say,
)

TOKENS = 16_384 if ON_CUDA else 128
LAYERS = 32 if ON_CUDA else 2
SHAPE: dict[str, Any] = (
    {"hidden_size": 4096, "intermediate_size": 11_008, "vocab_size": 32_000}
    | {"num_attention_heads": 32, "num_key_value_heads": 32}
    if ON_CUDA
    else {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 2048}
    | {"num_attention_heads": 4, "num_key_value_heads": 4}
) | {"max_position_embeddings": TOKENS}
RANK = 16
ROUNDS = 2
"""Turns of each side, with a fresh model each."""
UPDATES = 4
"""Of a turn; the first is not timed."""
SET_UP = 10.0
"""Seconds that a turn takes before and after its updates, about."""


def synthetic_rows() -> TokenRows:
    """Rows of random token ids, one an update."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SHAPE["vocab_size"], (UPDATES, TOKENS), generator=generator)
    return TokenRows(ids)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side's turn gave."""

    seconds: tuple[float, ...]
    """Of each timed update."""
    peak: float
    """GiB, the model included."""
    losses: tuple[float, ...]


Side = Callable[..., tuple[Clock, list[dict[str, Any]]]]


def measure(deadline: float) -> None:
    """One table: both sides, and the plan."""
    attempts = Attempts(deadline)
    sides: dict[str, Side] = {"longctx": train_ours}
    if find_spec("trl") is None:
        say("TRL is not installed: longctx alone")
    else:
        sides["TRL's SFTTrainer"] = train_theirs
    layers = layers_that_fit(deadline, turns=ROUNDS * len(sides))
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for number in range(ROUNDS):
        for name, side in sides.items():
            what = f"{name}, turn {number + 1}"
            kept = partial(_keep_turn, turns[name], side, layers)
            attempts.cells(what, ("tokens a second", "peak"), kept)
    if not turns["longctx"]:
        raise PartFailed("not one turn of longctx's trainer was through")
    predicted = planned(layers)
    publish(
        "lora",
        "LoRA of a 7B-shaped model",
        [_row(name, found, predicted) for name, found in turns.items() if found],
        f"A random LLaMA (hidden {SHAPE['hidden_size']}, {layers} layers"
        f"{'' if layers == LAYERS else f': {LAYERS} would have taken too long'}, vocabulary "
        f"{SHAPE['vocab_size']:,}) in bfloat16, rank {RANK} on the attention, one row of "
        f"{TOKENS:,} tokens an update, activations made again layer by layer. {ROUNDS} turns of "
        f"{UPDATES} updates for each side, by turns, the first update of each not timed. longctx: "
        "chunked loss. TRL: its own settings (gradient checkpointing, bf16, no packing). The plan: "
        f"{predicted}",
    )
    attempts.check()


def layers_that_fit(deadline: float, turns: int) -> int:
    """How many layers leave time for so many turns, from a short run of a few; it warms up too."""
    if not ON_CUDA:
        return LAYERS
    few = 4
    probe = take_turn(train_ours, few)
    one_layer = median(probe.seconds) / few
    left = deadline - time.monotonic() - turns * SET_UP
    layers = max(few, min(LAYERS, int(left / (turns * UPDATES * one_layer))))
    say(f"{one_layer:.3f} s for a layer, {left:.0f} s left: {layers} layers")
    return layers


def take_turn(side: Side, layers: int) -> Turn:
    """Train a fresh model."""
    found: list[tuple[Clock, list[dict[str, Any]]]] = []

    def train() -> None:
        with tempfile.TemporaryDirectory() as folder:
            model = build_llama(config_of(layers))
            settings: dict[str, Any] = {"rank": RANK, "checkpointing": "layers"}
            found.append(side(model, synthetic_rows(), Path(folder), **settings))

    free_memory()
    peak = peak_gib(train)
    clock, history = found[0]
    losses = tuple(float(entry["loss"]) for entry in history if "loss" in entry)
    return Turn(tuple(clock.seconds), peak, losses)


def config_of(layers: int) -> LlamaConfig:
    """The model's shape."""
    return LlamaConfig(**SHAPE, num_hidden_layers=layers)


def planned(layers: int) -> MemoryPlan:
    """What `longctx plan` says of it."""
    settings = PlanSettings(
        max_length=TOKENS,
        lora_r=RANK,
        gradient_checkpointing="layers",
        pack=False,
        device=DEVICE,
        dtype="bfloat16",
    )
    return plan(config_of(layers), settings)


def _keep_turn(turns: list[Turn], side: Side, layers: int) -> Sequence[str]:
    turn = take_turn(side, layers)
    turns.append(turn)
    return f"{TOKENS / median(turn.seconds):,.0f} tokens a second", f"{turn.peak:.2f} GiB"


def _row(name: str, turns: Sequence[Turn], predicted: MemoryPlan) -> dict[str, str]:
    seconds = [s for turn in turns for s in turn.seconds]
    peak = max(turn.peak for turn in turns)
    ours = name == "longctx"
    return {
        "trainer": name,
        "tokens a second": f"{TOKENS / median(seconds):,.0f}",
        "seconds an update, fastest to slowest": f"{min(seconds):.3f} to {max(seconds):.3f}",
        "peak GiB": f"{peak:.2f}",
        "planned GiB": f"{predicted.total:.2f}" if ours else "",
        "planned / peak": f"{predicted.total / peak:.3f}" if ours else "",
        "first and last loss": f"{turns[0].losses[0]:.4f}, {turns[0].losses[-1]:.4f}",
    }
