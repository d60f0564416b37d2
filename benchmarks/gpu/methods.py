"""Every method on the device, in float32 and bfloat16, against float32 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import longctx
from tests.families import WINDOW, build, tokens
from tests.test_matrix import settings

from ._common import DEVICE, Attempts, publish

FAMILIES = ("llama", "qwen3", "gemma3")
LENGTH = 3 * WINDOW
DTYPES = (torch.float32, torch.bfloat16)


def measure(deadline: float) -> None:
    """One table: methods by families and dtypes."""
    attempts = Attempts(deadline)
    rows: list[dict[str, str]] = []
    for name in ("none", *longctx.available()):
        row = {"method": name}
        for family in FAMILIES:
            names = [f"{family} {str(dtype).removeprefix('torch.')}" for dtype in DTYPES]
            what = f"{name} on {family}"
            row |= attempts.cells(what, names, lambda n=name, f=family: differences(f, n))
        rows.append(row)
    publish(
        "methods",
        "methods against the CPU",
        rows,
        "Largest difference from float32 on the CPU, relative to the largest logit: tiny random "
        f"models, {LENGTH} tokens in a window of {WINDOW}, a factor of 4. What bfloat16 alone "
        'costs stands at "none". After each of them the model without its method gave the logits '
        "of before, bit for bit.",
    )
    attempts.check()


def differences(family: str, name: str) -> Sequence[str]:
    """Of the logits in each dtype; the method is taken off again each time.

    Raises:
        ValueError: logits that are not numbers, or an undo that is not bit-exact.
    """
    model, ids = build(family), tokens(LENGTH)
    wanted = patched_logits(model, name, ids)
    scale = wanted.abs().max().item()
    found: list[str] = []
    for dtype in DTYPES:
        placed = copy.deepcopy(model).to(DEVICE, dtype)
        before = logits(placed, ids)
        error = (patched_logits(placed, name, ids) - wanted).abs().max().item() / scale
        if not torch.equal(logits(placed, ids), before):
            raise ValueError(f"{name} on {family} in {dtype}: undo is not bit-exact")
        if not error < 1:
            raise ValueError(f"{name} on {family} in {dtype}: off by {error} of the largest logit")
        found.append(f"{error:.1e}")
    return found


def patched_logits(model: Any, name: str, ids: Tensor) -> Tensor:
    """Logits under a method, in the mode in which it acts."""
    if name == "none":
        return logits(model, ids)
    with longctx.extend(model, settings(name)):
        found = logits(model.train(name == "shifted"), ids)
    model.eval()
    return found


def logits(model: Any, ids: Tensor) -> Tensor:
    """Float32 on the CPU, [1, S, V]."""
    with torch.no_grad():
        return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
