"""How fast this machine reads its memory and multiplies matrices: two short runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Machine", "measure_machine"]

_BYTES = 2**28
"""Of the matrix whose product with a vector is timed: more than any cache holds."""
_SIDE = 1_024
_SECONDS = 0.5
"""Of each measurement, at least."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured."""

    device: str
    threads: int
    """Of torch, on a CPU."""
    bandwidth: float
    """GB/s (10⁹ bytes) of a matrix-vector product, as decoding reads weights."""
    tflops: float
    """TFLOP/s of a matrix product, as prompts are read."""

    def __str__(self) -> str:
        where = f"{self.threads} threads of the CPU" if self.device == "cpu" else self.device
        return (
            f"measured on {where}: {self.bandwidth:.1f} GB/s (matrix times vector), "
            f"{self.tflops:.3f} TFLOP/s (matrix times matrix)"
        )


def measure_machine(
    device: str, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> Machine:
    """Time a matrix-vector and a matrix product.

    Args:
        device: a torch device.
        dtype: of the weights.
        clock: in seconds; `time.process_time` for one thread of a CPU that others use too.
    """
    size = torch.finfo(dtype).bits // 8
    columns = 4_096
    matrix = torch.ones(_BYTES // size // columns, columns, device=device, dtype=dtype)
    vector = torch.ones(columns, device=device, dtype=dtype)
    reading = _seconds(lambda: matrix @ vector, device, clock)
    square = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    multiplying = _seconds(lambda: square @ square, device, clock)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return Machine(
        name, torch.get_num_threads(), _BYTES / reading / 1e9, 2 * _SIDE**3 / multiplying / 1e12
    )


def _seconds(call: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    """The fastest of several calls: others on the machine only slow it down."""

    def once() -> float:
        begin = clock()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return clock() - begin

    once()
    found, stop = [once()], time.perf_counter() + _SECONDS
    while time.perf_counter() < stop or len(found) < 3:
        found.append(once())
    return min(found)
