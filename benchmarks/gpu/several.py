"""Several GPUs: one model spread over two, and one sweep shared by two processes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import Tensor

import longctx
from longctx.checkpoint import load
from longctx.eval import Passkey, sweep
from longctx.eval.reporting.files import write_sweep

from ._common import ON_CUDA, Attempts, Skipped, free_memory, publish, ratio_within, seconds_of

METHODS = ("none", "yarn:4", "alibi")
TOKENS = 1024
LENGTH, SAMPLES = 256, 4
SWEEP = ("--tasks", "passkey", "--lengths", f"{LENGTH}", "--samples", f"{SAMPLES}")
"""Of the embedded model."""


def measure(deadline: float) -> None:
    """One table of a spread model, one of a shared sweep.

    Raises:
        Skipped: there is one GPU, or none.
    """
    cards = torch.cuda.device_count()
    if ON_CUDA and cards < 2:
        raise Skipped("one GPU")
    attempts = Attempts(deadline)
    if ON_CUDA:
        names = ("largest difference from one card", "time ratio [95%]")
        publish(
            "several",
            "a model on two cards",
            [
                {"method": name} | attempts.cells(f"spread, {name}", names, partial(_spread, name))
                for name in METHODS
            ],
            f"The embedded model's layers on two cards (`device_map`) against one, {TOKENS:,} "
            "tokens, in turns; the difference is relative to the largest logit.",
        )
    names = ("seconds", "same table as one process")
    publish(
        "several",
        "a sweep by two processes",
        [attempts.cells("torchrun", names, _shared_sweep)],
        f"`torchrun --nproc-per-node 2 -m longctx sweep demo {' '.join(SWEEP)}`, starting "
        "included.",
    )
    attempts.check()


def _spread(name: str) -> Sequence[str]:
    single, spread = (load("demo", device="cuda:0", dtype="float32")[0] for _ in range(2))
    half = sum(p.numel() * p.element_size() for p in spread.parameters()) * 6 // 10
    blocks: Any = spread._no_split_modules  # pyright: ignore[reportPrivateUsage]
    placed = infer_auto_device_map(
        spread, max_memory={0: half, 1: half}, no_split_module_classes=sorted(blocks)
    )
    if len(set(placed.values())) < 2:
        raise RuntimeError(f"accelerate put everything on one card: {placed}")
    spread = dispatch_model(spread, placed)
    ids = torch.arange(TOKENS, device="cuda:0")[None] % int(single.config.vocab_size)
    found = [_logits(model, name, ids).cpu() for model in (single, spread)]
    error = (found[1] - found[0]).abs().max() / found[0].abs().max()
    runs = [partial(_logits, model, name, ids) for model in (single, spread)]
    ratio = ratio_within(*runs, seconds=1.0)
    free_memory()
    return f"{error.item():.1e}", str(ratio)


def _logits(model: Any, name: str, ids: Tensor) -> Tensor:
    with torch.no_grad():
        if name == "none":
            return model(input_ids=ids).logits
        with longctx.extend(model, name):
            return model(input_ids=ids).logits


def _shared_sweep() -> Sequence[str]:
    with tempfile.TemporaryDirectory() as folder:
        alone, shared = Path(folder, "alone"), Path(folder, "shared")
        model, tokenizer = load("demo")
        found = sweep(model, tokenizer, Passkey(samples=SAMPLES), [LENGTH], progress=False)
        write_sweep(found, alone)
        seconds = seconds_of(partial(_torchrun, shared))
        if _values(alone) != _values(shared):
            raise RuntimeError("two processes give another table than one")
    return f"{seconds:.1f}", "yes"


def _torchrun(out: Path) -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "longctx")
    line = [sys.executable, "-m", *launcher, "sweep", "demo", *SWEEP, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{line} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def _values(folder: Path) -> list[tuple[str, ...]]:
    """What was measured, without how long it took."""
    with (folder / "sweep.csv").open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return [tuple(v for k, v in row.items() if "second" not in k) for row in rows]
