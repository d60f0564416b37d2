"""Run the parts: `python -m benchmarks.gpu [PART …] [--seconds 480]`; exit 1 if one failed."""

from __future__ import annotations

import argparse
import importlib
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging

from .._measure import machine
from ._common import ON_CUDA, PartFailed, Skipped, free_memory, say

PARTS = {
    "methods": 40,
    "attention": 60,
    "alibi": 150,
    "loss": 25,
    "scoring": 60,
    "lora": 130,
    "several": 60,
}
"""Each is a module of this package; seconds that it takes on an H100, about."""


def main() -> int:
    """Run the parts that were asked for, as far as the time goes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=480, help="for all of them together")
    asked = parser.parse_args()
    unknown = [name for name in asked.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    logging.set_verbosity_error()
    torch.set_float32_matmul_precision("highest")  # no TF32
    say(machine())
    return run_parts(asked.parts or list(PARTS), time.monotonic() + asked.seconds)


def run_parts(names: Sequence[str], end: float) -> int:
    """Run parts up to the first that fails, and the others in a new process after that.

    An error on the device can leave it unusable for the process that met it.
    """
    for index, name in enumerate(names):
        left = end - time.monotonic()
        needed = PARTS[name] if ON_CUDA else 0
        if left < needed:
            say(f"{name}: skipped: {left:.0f} s left, it takes about {needed}")
            continue
        if not run_part(name, min(left, 2 * PARTS[name])):
            rest = names[index + 1 :]
            if rest:
                seconds = str(max(0.0, end - time.monotonic()))
                command = [sys.executable, "-m", "benchmarks.gpu", *rest, "--seconds", seconds]
                free_memory()
                subprocess.run(command, check=False)
            return 1
    return 0


def run_part(name: str, seconds: float) -> bool:
    """Run one part, in so many seconds at most; whether all of it could be measured or skipped."""
    say(f"{name}: begins")
    begin = time.monotonic()
    part: Any = importlib.import_module(f".{name}", __package__)
    fine = False
    try:
        with time_limit(seconds):
            part.measure(begin + seconds)
        fine = True
        say(f"{name}: done in {time.monotonic() - begin:.0f} s")
    except Skipped as reason:
        fine = True
        say(f"{name}: skipped: {reason}")
    except PartFailed as reason:
        say(f"{name}: FAILED in part: {reason}")
    except Exception:
        traceback.print_exc()
        say(f"{name}: FAILED")
    free_memory()
    return fine


@contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """Raise TimeoutError in the block when its time is over."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())
