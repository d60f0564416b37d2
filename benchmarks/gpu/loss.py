"""The chunked loss at a large vocabulary against whole logits, forward and backward."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from longctx.train.loss.cross_entropy import CrossEntropyKernel
from longctx.train.loss.objective import Losses

from ..loss import plain, step
from ._common import DEVICE, ON_CUDA, Attempts, free_memory, peak_gib, publish, ratio_within

TOKENS, SIZE, VOCABULARY = (16_384, 2048, 128_256) if ON_CUDA else (256, 64, 1000)
SECONDS = 4.0 if ON_CUDA else 0.2
COLUMNS = (
    "time ratio [95%]",
    "whole logits (s)",
    "peak GiB",
    "peak GiB, whole logits",
    "gradients' relative difference: states",
    "weight",
)


def measure(deadline: float) -> None:
    """One row for each kernel that is there."""
    attempts = Attempts(deadline)
    own = "torch's" if hasattr(functional, "linear_cross_entropy") else "longctx's"
    kernels: list[tuple[str, CrossEntropyKernel]] = [(own, "torch")]
    if ON_CUDA and importlib.util.find_spec("liger_kernel") is not None:
        kernels.append(("Liger's", "liger"))
    rows = [
        {"loss": said} | attempts.cells(f"{said} loss", COLUMNS, partial(_compare, kernel))
        for said, kernel in kernels
    ]
    publish(
        "loss",
        "loss against whole logits",
        rows,
        f"{TOKENS:,} tokens, hidden {SIZE}, vocabulary {VOCABULARY:,}, bfloat16, forward and "
        "backward, in turns. Memory is the peak beyond states and weight, both gradients included.",
    )
    attempts.check()


def _chunked(kernel: CrossEntropyKernel, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return Losses(kernel=kernel)(hidden, weight, labels).total


def _compare(kernel: CrossEntropyKernel) -> Sequence[str]:
    inputs = _inputs()
    losses: tuple[Callable[..., Tensor], ...] = (plain, partial(_chunked, kernel))
    base, other = (partial(step, loss, *inputs) for loss in losses)
    peaks = [_peak(run, inputs) for run in (base, other)]
    errors = _gradient_differences(base, other, inputs)
    ratio = ratio_within(base, other, SECONDS)
    return (
        str(ratio),
        f"{ratio.base_seconds:.4f}",
        f"{peaks[1]:.2f}",
        f"{peaks[0]:.2f}",
        *(f"{error:.1e}" for error in errors),
    )


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw: dict[str, Any] = {"generator": generator, "device": DEVICE}
    hidden = torch.randn(1, TOKENS, SIZE, **draw).bfloat16().requires_grad_()
    weight = torch.randn(VOCABULARY, SIZE, **draw).mul_(0.05).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (1, TOKENS), **draw)


def _peak(run: Callable[[], Any], inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    found = 0.0
    for _ in range(2):  # what only a first call allocates does not count
        inputs[0].grad = inputs[1].grad = None
        free_memory()
        found = peak_gib(run)
    return found


def _gradient_differences(
    base: Callable[[], Any], other: Callable[[], Any], inputs: tuple[Tensor, Tensor, Tensor]
) -> list[float]:
    gradients: list[list[Tensor]] = []
    for run in (base, other):
        run()
        gradients.append([x.grad.float() for x in inputs[:2] if x.grad is not None])
    pairs = zip(*gradients, strict=True)
    return [((found - wanted).norm() / wanted.norm()).item() for wanted, found in pairs]
