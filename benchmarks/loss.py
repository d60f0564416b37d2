"""The loss without [S, vocab] logits: `python -m benchmarks.loss`.

8,192 tokens of SmolLM2-135M's width and vocabulary, forward and backward, against
`F.cross_entropy` over whole logits; with every token learnt, and with half of them ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from longctx.train.loss.objective import Losses

from ._measure import paired_ratio, peak_memory, write_results

TOKENS, VOCABULARY, SIZE = 8192, 49_152, 576
ROUNDS = 5


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden[0, :-1], weight)
    return functional.cross_entropy(logits.float(), labels[0, 1:], ignore_index=-100)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return Losses()(hidden, weight, labels).total


def step(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    hidden.grad = weight.grad = None
    loss(hidden, weight, labels).backward()


def main() -> None:
    """Compare time and memory, in float32 on a CPU and also in bfloat16 on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    write_results(
        "Loss against whole logits",
        "python -m benchmarks.loss",
        [_row(device, dtype, ignored) for dtype in dtypes for ignored in (0.0, 0.5)],
        f"{TOKENS} tokens, hidden {SIZE}, vocabulary {VOCABULARY}, forward and backward, {ROUNDS} "
        "rounds in turns. Memory is the peak beyond states and weight, both gradients included.",
    )


def _row(device: str, dtype: torch.dtype, ignored: float) -> dict[str, str]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCABULARY, (1, TOKENS), generator=generator)
    labels[torch.rand(1, TOKENS, generator=generator) < ignored] = -100
    shapes = ((1, TOKENS, SIZE), (VOCABULARY, SIZE))
    hidden, weight = (
        torch.randn(shape, generator=generator).mul_(scale).to(device, dtype).requires_grad_()
        for shape, scale in zip(shapes, (1.0, 0.05), strict=True)
    )
    inputs = (hidden, weight, labels.to(device))
    base, other = partial(step, plain, *inputs), partial(step, ours, *inputs)
    gradients: list[Tensor] = []
    for run in (base, other):
        run()
        assert weight.grad is not None
        gradients.append(weight.grad.float())
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    del gradients
    peaks: list[float] = []
    for run in (base, other):
        hidden.grad = weight.grad = None
        peaks.append(peak_memory(run))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "ignored": f"{ignored:.0%}",
        "time ratio [95%]": str(paired_ratio(base, other, rounds=ROUNDS, warmup=1)),
        "peak MiB": f"{peaks[1]:.0f}",
        "peak MiB, whole logits": f"{peaks[0]:.0f}",
        "peak ratio": f"{peaks[1] / peaks[0]:.3f}",
        "gradient of the weight, relative difference": f"{error.item():.1e}",
    }


if __name__ == "__main__":
    main()
