"""What the parts share: the device, the time that is left, and where tables go."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from longctx.scoring.batching import is_out_of_memory

from .._measure import Ratio, paired_ratio, peak_memory, table_of, write_results

__all__ = [
    "DEVICE",
    "ON_CUDA",
    "Attempts",
    "PartFailed",
    "Skipped",
    "build_llama",
    "free_memory",
    "peak_gib",
    "publish",
    "ratio_within",
    "say",
    "seconds_of",
]

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
COMMAND = "python -m benchmarks.gpu"
_MOST_ROUNDS, _FEWEST_ROUNDS = 9, 3
_BEGIN = time.monotonic()


class Skipped(Exception):  # noqa: N818 - not an error
    """A part has nothing to do on this machine, and says why."""


class PartFailed(Exception):  # noqa: N818 - said of a part whose tracebacks are printed already
    """Some figures of a part could not be measured; the others are in its tables."""


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - _BEGIN:6.1f} s] {text}", flush=True)


def publish(part: str, section: str, rows: Sequence[Mapping[str, object]], notes: str) -> None:
    """Write a section of RESULTS.md on CUDA; elsewhere print the table."""
    if ON_CUDA:
        write_results(f"GPU: {section}", f"{COMMAND} {part}", rows, notes)
        print(flush=True)
    else:
        print(f"\n{section} (tiny sizes, a trial of the code)\n\n{table_of(rows)}\n", flush=True)


@dataclass(slots=True)
class Attempts:
    """Figures that are each measured if they can be; what fails does not take the others along."""

    deadline: float = float("inf")
    """Of `time.monotonic()`: nothing is begun after it."""
    failed: list[str] = field(default_factory=list)

    def cells(self, what: str, names: Sequence[str], measure: Callable[[], Sequence[str]]) -> dict[
        str, str
    ]:  # fmt: skip
        """The cells `names` of a row as `measure` gives them, or why they are not there."""
        if time.monotonic() > self.deadline:
            say(f"{what}: no time left")
            return dict.fromkeys(names, "no time left")
        try:
            found = dict(zip(names, measure(), strict=True))
        except Exception as error:
            if is_out_of_memory(error):
                found = dict.fromkeys(names, "out of memory")
            else:
                traceback.print_exc()
                self.failed.append(what)
                found = dict.fromkeys(names, f"failed ({type(error).__name__})")
        free_memory()
        say(f"{what}: {', '.join(found.values())}")
        return found

    def check(self) -> None:
        """End the part as failed if a figure failed.

        Raises:
            PartFailed: it names them.
        """
        if self.failed:
            raise PartFailed(f"not measured: {'; '.join(self.failed)}")


def seconds_of(call: Callable[[], Any]) -> float:
    """Time one call, to the end of what it started on the device."""
    _synchronize()
    begin = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - begin


def ratio_within(base: Callable[[], Any], other: Callable[[], Any], seconds: float) -> Ratio:
    """`paired_ratio` in as many rounds as take about so many seconds."""
    base()
    other()
    once = seconds_of(base) + seconds_of(other)
    rounds = max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, int(seconds / once)))
    return paired_ratio(base, other, rounds=rounds, warmup=0)


def peak_gib(call: Callable[[], Any]) -> float:
    """GiB that a call needs at its peak beyond what was held before."""
    return peak_memory(call) / 1024


def free_memory() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if ON_CUDA:
        torch.cuda.empty_cache()


def build_llama(config: LlamaConfig) -> PreTrainedModel:
    """A random LLaMA in bfloat16, made on the device: no weights on disk or in CPU memory."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def _synchronize() -> None:
    if ON_CUDA:
        torch.cuda.synchronize()
