"""Our trainer beside TRL's SFTTrainer, on a CPU: `python -m benchmarks.trl MODEL [ROUNDS]`.

LoRA of rank 16 on the attention, float32, one row of 2,048 tokens an update, activations kept.
Each turn is a process of its own with a fresh model, the two trainers in turns; MODEL is a folder
such as SmolLM2's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import longctx
from longctx.prompts.haystacks import held_in

from ._measure import peak_memory, write_results
from ._trainers import TokenRows, train_ours, train_theirs

TOKENS, RANK = 2048, 16
UPDATES = 2
"""Of a turn; the first is not timed."""
SIDES = {"longctx": train_ours, "TRL's SFTTrainer": train_theirs}


def take_turn(name: str, folder: str) -> dict[str, Any]:
    """Train a fresh model in this process.

    Returns:
        Seconds and seconds of CPU time of each timed update, GiB at the peak beyond the loaded
        model, and the losses.
    """
    model, tokenizer = longctx.load(folder)
    ids: Any = tokenizer("\n".join(held_in().documents), add_special_tokens=False)["input_ids"]
    rows = TokenRows(torch.tensor(ids[: UPDATES * TOKENS]).view(UPDATES, TOKENS))
    found: list[Any] = []

    def train() -> None:
        with tempfile.TemporaryDirectory() as run:
            side = SIDES[name]
            found.append(side(model, rows, Path(run), rank=RANK, checkpointing="none"))

    peak = peak_memory(train)
    clock, history = found[0]
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    return {
        "seconds": clock.seconds,
        "cpu": clock.cpu_seconds,
        "peak": peak / 1024,
        "losses": losses,
    }


def row(name: str, turns: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A line of the table."""
    rates = [TOKENS / seconds for turn in turns for seconds in turn["seconds"]]
    cpu = [TOKENS / seconds for turn in turns for seconds in turn["cpu"]]
    peaks = [turn["peak"] for turn in turns]
    return {
        "trainer": name,
        "tokens a CPU second": f"{median(cpu):.0f}",
        "slowest to fastest update": f"{min(cpu):.0f} to {max(cpu):.0f}",
        "tokens a second": f"{median(rates):.0f}",
        "peak GiB": f"{median(peaks):.2f}",
        "losses": ", ".join(f"{loss:.3f}" for loss in turns[0]["losses"]),
    }


def main() -> None:
    """Measure both, in turns."""
    given = sys.argv[1:]
    if not given:
        raise SystemExit(__doc__)
    if len(given) == 3 and given[0] == "--turn":
        print(json.dumps(take_turn(given[1], given[2])))
        return
    rounds = int(given[1]) if len(given) > 1 else 3
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for number in range(rounds):
        for name in [*SIDES][:: -1 if number % 2 else 1]:
            command = [sys.executable, "-m", "benchmarks.trl", "--turn", name, given[0]]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            turns[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}, turn {number + 1}: {turns[name][-1]}", flush=True)
    cpu = {name: [s for turn in found for s in turn["cpu"]] for name, found in turns.items()}
    ratios = [theirs / ours for ours, theirs in zip(*cpu.values(), strict=True)]
    write_results(
        "LoRA against TRL",
        "python -m benchmarks.trl MODEL",
        [row(name, found) for name, found in turns.items()],
        f"SmolLM2-135M-Instruct in float32, LoRA of rank {RANK} on the attention, one row of "
        f"{TOKENS:,} tokens of Python's manual an update, activations kept. {rounds} turns of "
        f"{UPDATES} updates for each, the trainers in turns, each turn a process of its own; the "
        "first update of a turn is not timed. Medians; the peak is what training takes beyond the "
        "loaded model. TRL: its own settings, but for no packing and no gradient checkpointing. "
        "A CPU second is one of all threads together, and does not count what other processes do "
        f"meanwhile. Update by update TRL takes {median(ratios):.2f} times the CPU time (median of "
        f"{len(ratios)}; {min(ratios):.2f} to {max(ratios):.2f}). Losses are those of the first "
        "turn.",
    )


if __name__ == "__main__":
    main()
