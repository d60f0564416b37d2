"""Remapped attention against plain causal attention: `python -m benchmarks.attention`.

What is timed is a method's whole rule, turns of queries and keys included. The plan and its phases,
which the layers of a pass share, are timed apart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from longctx.attention.remapped import Planner, RegionRule
from longctx.attention.turning import Rotation
from longctx.patches.block_sparse import BandedPlanner, BlocksPlanner, StridedPlanner
from longctx.patches.dual_chunk import DualChunkPlanner
from longctx.patches.rerope import ReRopePlanner
from longctx.patches.self_extend import SelfExtendPlanner
from longctx.patches.sink_window import SinkWindowPlanner
from longctx.patches.string import StringPlanner

from ._measure import paired_ratio, peak_memory, write_results

DIM = 64
HEADS = (8, 8)
"""(query heads, key/value heads)."""
LENGTHS = (4096, 8192, 16_384)
DECODE = (8192, ((8, 8), (9, 3)))
ROUNDS = {4096: 7, 8192: 7, 16_384: 3}
DECODE_ROUNDS = 41
FRESH = 30
"""Plans that are made for one time."""

Inputs = tuple[Tensor, Tensor, Tensor]
Run = Callable[[Inputs], Tensor]
Step = Callable[[Run, Inputs], object]


@dataclass(frozen=True, slots=True)
class Case:
    """A planner and what its rule may cost, as a ratio to plain attention."""

    planner: Planner
    forward: dict[int, float]
    """By length; lengths without a limit are timed all the same."""
    both: float | None = None
    """Forward and backward at 4,096 tokens; None leaves that out."""
    decode: bool = False


CASES = {
    "self_extend, W = 1,024": Case(SelfExtendPlanner(1024, 8), {8192: 1.3}, decode=True),
    "rerope, w = 1,024": Case(ReRopePlanner(1024, None), {8192: 1.3}, both=1.28, decode=True),
    "leaky rerope, w = 1,024": Case(ReRopePlanner(1024, 8.0), {8192: 1.3}, decode=True),
    "string, S = 2,730": Case(StringPlanner(2730, 128), {}, decode=True),
    "dual_chunk, L = 4,096": Case(DualChunkPlanner(2560, 3072), {8192: 1.2}, decode=True),
    "dual_chunk, L = 2,048": Case(DualChunkPlanner(1280, 1536), {8192: 1.2}, both=1.09),
    "window of 1,024": Case(BandedPlanner(1024), {8192: 0.4, 16_384: 0.2}, both=0.68),
    "window of 1,024 and 4 sinks": Case(
        SinkWindowPlanner(4, 1024, None), {8192: 0.5, 16_384: 0.25}, decode=True
    ),
    "strided by 64": Case(StridedPlanner(64), {}),
    "blocks of 256: own, previous, every 4th": Case(
        BlocksPlanner(256, 2, 0, 4), {8192: 0.4}, decode=True
    ),
}
DECODE_LIMIT = 1.4


@lru_cache
def rotation(heads: int, kv_heads: int, device: str = "cpu") -> Rotation:
    """That of a small LLaMA with these heads."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=heads * DIM,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    layer: Any = model.model.layers[0]
    return Rotation(model, None, layer.self_attn)


def inputs(queries: int, keys: int, heads: int, kv_heads: int) -> Inputs:
    """q, k, v as a model lays them out: k and v of a cache one head after the other."""
    generator = torch.Generator().manual_seed(heads)

    def draw(length: int, heads: int, cached: bool) -> Tensor:
        x = torch.randn(1, length, heads, DIM, generator=generator).transpose(1, 2)
        return x.contiguous().requires_grad_() if cached else x.requires_grad_()

    cached = queries < keys
    k, v = (draw(keys, kv_heads, cached) for _ in range(2))
    return draw(queries, heads, False), k, v


def plain(qkv: Inputs) -> Tensor:
    q, k, v = qkv
    causal = q.shape[2] == k.shape[2]
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


@dataclass(frozen=True, slots=True)
class Remapped:
    """A rule on consecutive tokens, the last query on the last key."""

    rule: RegionRule
    positions: Tensor

    @classmethod
    def of(cls, name: str, qkv: Inputs) -> Remapped:
        """The rule of a case for these inputs."""
        q, k, _ = qkv
        positions = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[None]
        turns = rotation(q.shape[1], k.shape[1], q.device.type)
        return cls(RegionRule(CASES[name].planner, turns), positions)

    def __call__(self, qkv: Inputs) -> Tensor:
        """Attend."""
        return self.rule(*qkv, mask=None, positions=self.positions, scaling=DIM**-0.5)


def forward(run: Run, qkv: Inputs) -> Tensor:
    with torch.no_grad():
        return run(qkv)


def both(run: Run, qkv: Inputs) -> tuple[Tensor, ...]:
    """Forward and backward."""
    out = run(qkv)
    return torch.autograd.grad(out, qkv, torch.ones_like(out))


def planning(name: str) -> float:
    """Seconds for a plan and its phases when decoding: a layer of one head with and without."""
    qkv = inputs(1, DECODE[0], 1, 1)
    run = Remapped.of(name, qkv)
    again = [seconds_of(run, qkv) for _ in range(FRESH)]
    fresh = [seconds_of(Remapped(run.rule, run.positions.clone()), qkv) for _ in range(FRESH)]
    return median(fresh) - median(again)


def seconds_of(run: Run, qkv: Inputs) -> float:
    """For one forward pass."""
    begin = perf_counter()
    forward(run, qkv)
    return perf_counter() - begin


def memory(name: str | None) -> list[float]:
    """Peak MiB of a forward pass beyond q, k and v by length, without what only a first call needs.

    For a process of its own: what earlier runs left in the heap counts.
    """
    torch.set_num_threads(1)
    found: list[float] = []
    for length in LENGTHS:
        qkv = inputs(length, length, *HEADS)
        run = plain if name is None else Remapped.of(name, qkv)
        forward(run, qkv)
        found.append(peak_memory(partial(forward, run, qkv)))
    return found


def _memory_row(name: str | None) -> dict[str, str]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(memory, name).result()
    cells = {f"{length:,} tokens": f"{mib:.0f}" for length, mib in zip(LENGTHS, found, strict=True)}
    return _said({"rule": name or "plain"} | cells)


def _said(row: dict[str, str]) -> dict[str, str]:
    """Show a row as soon as it is there."""
    print(*row.values(), sep="  ", file=sys.stderr)
    return row


def _row(name: str, step: Step, length: int, limit: float | None) -> dict[str, str]:
    qkv = inputs(length, length, *HEADS)
    run = Remapped.of(name, qkv)
    ratio = paired_ratio(
        partial(step, plain, qkv), partial(step, run, qkv), rounds=ROUNDS[length], warmup=1
    )
    return _said(
        {
            "rule": name,
            "tokens": f"{length:,}",
            "rule / plain [95%]": str(ratio),
            "at most": "" if limit is None else f"{limit:.2f}",
            "plain (s)": f"{ratio.base_seconds:.2f}",
        }
    )


def _decode_row(name: str, heads: tuple[int, int]) -> dict[str, str]:
    qkv = inputs(1, DECODE[0], *heads)
    run = Remapped.of(name, qkv)
    ratio = paired_ratio(
        partial(forward, plain, qkv), partial(forward, run, qkv), rounds=DECODE_ROUNDS, warmup=5
    )
    return _said(
        {
            "rule": name,
            "heads / kv heads": f"{heads[0]} / {heads[1]}",
            "rule / plain [95%]": str(ratio),
            "at most": f"{DECODE_LIMIT:.2f}",
            "plain (ms)": f"{1e3 * ratio.base_seconds:.2f}",
            "plan and phases, once for all layers (ms)": f"{1e3 * planning(name):.2f}",
        }
    )


COMMAND = "python -m benchmarks.attention"
SHAPE = f"{HEADS[0]} heads over {HEADS[1]}, head dim {DIM}, float32"


def decoding() -> None:
    write_results(
        "Remapped attention: one step of decoding",
        COMMAND,
        [
            _decode_row(name, heads)
            for name, case in CASES.items()
            if case.decode
            for heads in DECODE[1]
        ],
        f"{DECODE[0]:,} cached keys, head dim {DIM}, float32, {DECODE_ROUNDS} rounds in turns.",
    )


def memory_table() -> None:
    write_results(
        "Remapped attention: memory",
        COMMAND,
        [_memory_row(name) for name in (None, *CASES)],
        f"Peak MiB of a forward pass beyond q, k and v; {SHAPE}.",
    )


def backward() -> None:
    write_results(
        "Remapped attention: forward and backward",
        COMMAND,
        [
            _row(name, both, LENGTHS[0], case.both)
            for name, case in CASES.items()
            if case.both is not None
        ],
        f"{SHAPE}, in turns; {ROUNDS[LENGTHS[0]]} rounds.",
    )


def forward_table() -> None:
    rounds = "; ".join(f"{count} rounds at {length:,}" for length, count in ROUNDS.items())
    write_results(
        "Remapped attention: forward",
        COMMAND,
        [
            _row(name, forward, length, case.forward.get(length))
            for name, case in CASES.items()
            for length in LENGTHS
        ],
        f"{SHAPE}, in turns; {rounds}. Turns of queries and keys are in it, the plan and its "
        "phases, which all layers of a pass share, are not.",
    )


def main() -> None:
    """Measure and write four sections of RESULTS.md."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for table in (decoding, memory_table, backward, forward_table):
        table()
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
