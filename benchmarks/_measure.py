"""Paired timing, peak memory, and the file that the figures go to."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["Ratio", "machine", "paired_ratio", "peak_memory", "table_of", "write_results"]

RESULTS = Path(__file__).with_name("RESULTS.md")
_MMAP_THRESHOLD = -3  # mallopt's name for it


@dataclass(frozen=True, slots=True)
class Ratio:
    """Time of one thing over that of another, measured in turns."""

    median: float
    low: float
    """Lower end of the 95% bootstrap interval of the median."""
    high: float
    base_seconds: float
    """Median time of the baseline."""
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(
    base: Callable[[], Any], other: Callable[[], Any], rounds: int = 15, warmup: int = 2
) -> Ratio:
    """Time `base` and `other` in turns, the order alternating, and compare them round by round."""
    for _ in range(warmup):
        base()
        other()
    pairs = np.empty((rounds, 2))
    for index in range(rounds):
        order = (0, 1) if index % 2 else (1, 0)
        for which in order:
            pairs[index, which] = _seconds((base, other)[which])
    ratios = pairs[:, 1] / pairs[:, 0]
    draws = np.random.default_rng(0).choice(ratios, size=(10_000, rounds))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return Ratio(
        float(np.median(ratios)), float(low), float(high), float(np.median(pairs[:, 0])), rounds
    )


def _seconds(call: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_memory(call: Callable[[], Any]) -> float:
    """Run `call` and return the MiB it needed at its peak beyond what was held before.

    On CUDA the allocator's own count; else the kernel's high-water mark of this process, reset
    before. What `malloc` holds back is returned first, and large blocks are mapped one by one, so
    that memory left over from an earlier call does not hide the need of this one.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def machine() -> str:
    """Say in words what the figures were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{os.cpu_count()} cores ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}),"
        f" {memory:.0f} GiB, {device}; torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def table_of(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as a Markdown table, whose columns are the first row's."""
    columns = list(rows[0])
    return "\n".join(
        [
            f"| {' | '.join(columns)} |",
            f"|{'---|' * len(columns)}",
            *(f"| {' | '.join(str(row[column]) for column in columns)} |" for row in rows),
        ]
    )


def write_results(
    section: str, command: str, rows: Sequence[Mapping[str, object]], notes: str = ""
) -> None:
    """Replace one section of RESULTS.md: command, machine, date, and the rows as a table."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    body = [f"## {section}", f"`{command}`, {date}. {machine()}.", table_of(rows)]
    if notes:
        body.append(notes)
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Measured results\n"
    head, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    kept = [part.strip() for part in sections if not part.startswith(f"## {section}\n")]
    whole = [head.strip(), *sorted([*kept, "\n\n".join(body)])]
    RESULTS.write_text("\n\n".join(whole) + "\n", encoding="utf-8")
    print("\n".join(body[1:]))
