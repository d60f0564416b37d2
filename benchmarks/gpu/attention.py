"""Attention at distances of its own on the device: errors against the CPU, and time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..attention import CASES, Inputs, Remapped, both, inputs, plain
from ._common import DEVICE, ON_CUDA, Attempts, peak_gib, publish, ratio_within

COMPARED = 1024 if ON_CUDA else 96
"""Tokens of what the CPU computes too."""
LENGTH = 8192 if ON_CUDA else 128
HEADS = (32, 8) if ON_CUDA else (4, 2)
SECONDS = 1.0 if ON_CUDA else 0.05
ERRORS = ("output, float32", "gradients, float32", "output, bfloat16", "gradients, bfloat16")
AGAINST_PLAIN = ("rule / plain [95%]", "plain (s)", "peak GiB", "peak GiB, plain")


def measure(deadline: float) -> None:
    """Two tables: errors by rule, times by rule."""
    attempts = Attempts(deadline)
    publish(
        "attention",
        "remapped attention, errors",
        [
            {"rule": name} | attempts.cells(f"error of {name}", ERRORS, partial(_errors, name))
            for name in CASES
        ],
        f"Root mean square over that of float64 on the CPU, {COMPARED} tokens, {HEADS[0]} heads "
        f"over {HEADS[1]}; the largest of q, k and v.",
    )
    rows: list[dict[str, str]] = []
    for name in CASES:
        torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage] # it bounds what it compiles
        cells = attempts.cells(f"time of {name}", AGAINST_PLAIN, partial(_compare, name))
        rows.append({"rule": name} | cells)
    publish(
        "attention",
        "remapped attention, against plain causal attention",
        rows,
        f"{LENGTH:,} tokens, {HEADS[0]} heads over {HEADS[1]}, bfloat16, forward and backward. "
        "Memory is the peak beyond q, k and v. flex_attention was compiled before.",
    )
    attempts.check()


def _placed(length: int, device: str, dtype: torch.dtype, through: torch.dtype) -> Inputs:
    """The same inputs everywhere, rounded to `through` first."""
    q, k, v = (
        x.detach().to(through).to(device, dtype).requires_grad_()
        for x in inputs(length, length, *HEADS)
    )
    return q, k, v


def _results(name: str, qkv: Inputs) -> list[Tensor]:
    """Output and gradients, in float64 on the CPU."""
    out = Remapped.of(name, qkv)(qkv)
    gradients = torch.autograd.grad(out.double().sin().sum(), qkv)
    return [x.detach().double().cpu() for x in (out, *gradients)]


def _errors(name: str) -> Sequence[str]:
    torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
    found: list[str] = []
    for dtype in (torch.float32, torch.bfloat16):
        exact = _results(name, _placed(COMPARED, "cpu", torch.float64, dtype))
        mine = _results(name, _placed(COMPARED, DEVICE, dtype, dtype))
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(mine, exact, strict=True)]
        found += [f"{errors[0]:.1e}", f"{max(errors[1:]):.1e}"]
    return found


def _compare(name: str) -> Sequence[str]:
    qkv = _placed(LENGTH, DEVICE, torch.bfloat16, torch.bfloat16)
    base, other = partial(both, plain, qkv), partial(both, Remapped.of(name, qkv), qkv)
    ratio = ratio_within(base, other, SECONDS)
    peaks = [f"{peak_gib(run):.2f}" for run in (other, base)]
    return (str(ratio), f"{ratio.base_seconds:.4f}", *peaks)
