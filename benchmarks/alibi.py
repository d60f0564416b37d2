"""ALiBi's attention against plain causal attention: `python -m benchmarks.alibi`.

Baselines: `scaled_dot_product_attention(is_causal=True)` without any bias, and the same function
given the bias as a ready-made [H, N, N] tensor. On a GPU everything runs in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from longctx.attention.dispatch import attend
from longctx.attention.reference import attention_with_linear_bias
from longctx.patches.alibi import slopes

from ._measure import paired_ratio, peak_memory, write_results

LENGTH, DIM = 8192, 64
HEADS = ((9, 3), (8, 8), (32, 8))
"""(query heads, key/value heads); the last one is timed against plain attention only."""
ROUNDS = 9
PROCESSES = 5
"""For each figure of memory, which scatters by a few MiB from one to the next."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(heads: int, kv_heads: int, batch: int = 1, dtype: torch.dtype = DTYPE) -> Inputs:
    """q, k, v laid out as a transformers model lays them out."""
    generator = torch.Generator().manual_seed(heads)

    def draw(heads: int) -> Tensor:
        x = torch.randn(batch, LENGTH, heads, DIM, generator=generator)
        return x.to(DEVICE, dtype).transpose(1, 2).requires_grad_()

    return draw(heads), draw(kv_heads), draw(kv_heads)


def plain(qkv: Inputs, bias: Tensor | None = None) -> Tensor:
    q, k, v = qkv
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=True
    )


def alibi(qkv: Inputs, mask: Tensor | None = None) -> Tensor:
    return attend(*qkv, slopes=slopes(qkv[0].shape[1]), mask=mask)


def forward(run: Callable[[Inputs], Tensor], qkv: Inputs) -> Tensor:
    with torch.no_grad():
        return run(qkv)


def both(run: Callable[[Inputs], Tensor], qkv: Inputs) -> tuple[Tensor, ...]:
    """Forward and backward."""
    out = run(qkv)
    return torch.autograd.grad(out, qkv, torch.ones_like(out))


def error(heads: int, kv_heads: int, dtype: torch.dtype) -> float:
    """Largest difference from float64 over every 61st row."""
    qkv = inputs(heads, kv_heads, dtype=dtype)
    rows = torch.arange(0, LENGTH, 61, device=DEVICE)
    with torch.no_grad():
        exact = attention_with_linear_bias(*qkv, slopes(heads), rows=rows)
        return (alibi(qkv)[:, :, rows] - exact).abs().max().item()


def materialised(heads: int) -> Callable[[Inputs], Tensor]:
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    bias = -torch.tensor(slopes(heads))[:, None, None] * distance
    bias = bias.masked_fill_(distance < 0, -torch.inf).to(DEVICE, DTYPE)[None]
    return partial(plain, bias=bias)


def memory(
    step: Callable[..., object], run: Callable[[Inputs], Tensor], heads: int, kv_heads: int
) -> float:
    """Peak MiB with the inputs counted in; what only a first call allocates is left out."""
    qkv = inputs(heads, kv_heads)
    step(run, qkv)
    held = sum(x.numel() * x.element_size() for x in qkv) / 2**20
    return held + peak_memory(partial(step, run, qkv))


def memory_apart(*what: Any) -> float:
    """Median of `memory` over processes of their own: what earlier runs left in the heap counts."""
    found: list[float] = []
    for _ in range(PROCESSES):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found.append(pool.submit(memory, *what).result())
    return median(found)


def _against_plain(heads: int, kv_heads: int, step: Callable[..., object]) -> dict[str, str]:
    qkv = inputs(heads, kv_heads)
    ours, theirs = (memory_apart(step, run, heads, kv_heads) for run in (alibi, plain))
    ratio = paired_ratio(partial(step, plain, qkv), partial(step, alibi, qkv), rounds=ROUNDS)
    with_tensor = "not measured"
    if heads < 32:
        base = materialised(heads)
        against = paired_ratio(
            partial(step, plain, qkv), partial(step, base, qkv), rounds=ROUNDS // 3, warmup=1
        )
        with_tensor = str(against)
    return {
        "heads / kv heads": f"{heads} / {kv_heads}",
        "what": "forward" if step is forward else "forward + backward",
        "ALiBi / plain [95%]": str(ratio),
        "bias tensor / plain [95%]": with_tensor,
        "plain (s)": f"{ratio.base_seconds:.2f}",
        "peak MiB, ALiBi / plain": f"{ours:.0f} / {theirs:.0f} = {ours / theirs:.2f}",
    }


def _padded(heads: int, kv_heads: int, step: Callable[..., object]) -> dict[str, str]:
    qkv = inputs(heads, kv_heads, batch=2)
    mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool, device=DEVICE)
    mask[0, ..., : LENGTH // 4] = False
    padded = partial(step, partial(alibi, mask=mask), qkv)
    ratio = paired_ratio(partial(step, alibi, qkv), padded, rounds=ROUNDS)
    return {
        "heads / kv heads": f"{heads} / {kv_heads}",
        "what": "forward" if step is forward else "forward + backward",
        "padded / unpadded [95%]": str(ratio),
    }


def main() -> None:
    """Measure time, memory and accuracy, and write three sections of RESULTS.md."""
    command = "python -m benchmarks.alibi"
    where = f"{LENGTH} tokens, head dim {DIM}, {str(DTYPE).removeprefix('torch.')}"
    write_results(
        "ALiBi: accuracy",
        command,
        [
            {
                "heads / kv heads": f"{heads} / {kv_heads}",
                "float32": f"{error(heads, kv_heads, torch.float32):.1e}",
                "bfloat16": f"{error(heads, kv_heads, torch.bfloat16):.1e}",
            }
            for heads, kv_heads in HEADS
        ],
        f"Largest difference from float64 at {LENGTH} tokens, q, k, v ~ N(0, 1); the reference "
        "gets the same rounded inputs.",
    )
    write_results(
        "ALiBi: against plain causal attention",
        command,
        [_against_plain(*heads, step) for heads in HEADS for step in (forward, both)],
        f"{where}; {ROUNDS} rounds in turns. Peak memory: inputs counted, median of {PROCESSES} "
        "processes.",
    )
    write_results(
        "ALiBi: left padding",
        command,
        [_padded(*heads, step) for heads in HEADS[:2] for step in (forward, both)],
        f"{where}, batch 2, a quarter of one row padded; {ROUNDS} rounds in turns.",
    )


if __name__ == "__main__":
    main()
