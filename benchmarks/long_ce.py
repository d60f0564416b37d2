"""What does LongCE cost, and what does it give? `python -m benchmarks.long_ce [RUNS]`.

The embedded model under yarn:4 is trained on with plain cross-entropy and with LongCE, on the same
rows of 1,024 tokens of the training documents in the same order. No setting was chosen by results:
γ is the paper's, K the model's own window, d half of it. Then keys, perplexity and LongPPL on what
was held out. An update of either loss is timed in turns. Figures of a run are kept in the folder
RUNS (longctx-long-ce), and a run that is there is not trained twice.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import longctx
from longctx.eval import LongPpl, Passkey, Perplexity, sweep
from longctx.eval.stats.intervals import mean_interval, perplexity_of, wilson
from longctx.train import LongCE, Losses, Training
from longctx.train.data.collate import Collator, unpacked_inputs
from longctx.train.engine.loss_forward import LossForward
from longctx.train.recipes import Recipe
from longctx.train.run import Run

from ._measure import Ratio, paired_ratio, write_results

UPDATES, ROWS, LENGTH, RATE = 50, 2, 1_024, 5e-4
METHOD, SHORT, STEP = "yarn:4", 256, 128
STEPS = (64, 128, 256)  # whose cost is measured
SEEDS = (1, 2)
EVALUATOR = "dual_chunk:factor=8,log_n=True"
TASKS = (
    Passkey(samples=50, seed=11),
    Perplexity(windows=10),
    LongPpl("demo", evaluator_method=EVALUATOR, short=128, alpha=1.0, windows=10),
)
LENGTHS = (256, LENGTH)
LOSSES = {"plain": Losses(), "LongCE": Losses(long_ce=LongCE(SHORT, STEP))}
_PREPARED: list[Any] = []  # the training documents as rows, the same for every run


def figures_of(runs: Path, name: str, seed: int) -> dict[str, list[Any]]:
    """Observations by task and length of a run, trained now if it is not there; "none" is not."""
    kept = runs / f"{name}-{seed}-{UPDATES}.json"
    if not kept.exists():
        model, tokenizer = longctx.load("demo")
        if name == "none":
            longctx.extend_all(model, longctx.parse_methods(METHOD))
        else:
            training = Training(
                max_steps=UPDATES, batch_size=ROWS, learning_rate=RATE, warmup=5, seed=seed
            )
            recipe = Recipe(
                method=METHOD, max_length=LENGTH, losses=LOSSES[name], training=training
            )
            with tempfile.TemporaryDirectory() as folder:
                run = Run(recipe, ("manual",), Path(folder) / "run", template="vicuna")
                run.extend(model)
                if not _PREPARED:
                    _PREPARED.extend(run.prepare(tokenizer))
                run.start(model, tokenizer, run.plan(tokenizer, _PREPARED), progress=False)
        result = sweep(model, tokenizer, TASKS[:2], LENGTHS, progress=False)
        keys = sweep(model, tokenizer, TASKS[2], LENGTH, progress=False)
        found: dict[str, list[Any]] = {}
        for record in (*result.records, *keys.records):
            for one in record.observations:
                cell = found.setdefault(f"{record.task}@{one.length}", [])
                cell.append([one.cluster, one.nll, one.targets, one.correct])
        kept.write_text(json.dumps(found))
        print(f"{name}, seed {seed}: {row(name, [found])}", flush=True)
    return json.loads(kept.read_text())


def row(name: str, found: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, str]:
    """A line of the table, seeds together; below it by seed."""
    cells = {"trained with": name}
    for length in LENGTHS:
        hits = [sum(o[3] for o in one[f"passkey@{length}"]) for one in found]
        n = sum(len(one[f"passkey@{length}"]) for one in found)
        low, high = wilson(sum(hits), n)
        each = f" ({' / '.join(map(str, hits))})" if len(found) > 1 else ""
        cells[f"keys at {length:,}"] = f"{sum(hits)} of {n} [{low:.0%}, {high:.0%}]{each}"
    for task in (f"perplexity@{LENGTHS[0]}", f"perplexity@{LENGTH}", f"longppl@{LENGTH}"):
        mean, low, high = map(
            perplexity_of, _over_documents([o for one in found for o in one[task]])
        )
        each = [_over_documents(one[task])[0] for one in found]
        apart = f" ({' / '.join(f'{perplexity_of(nll):.2f}' for nll in each)})"
        cells[task] = f"{mean:.2f} [{low:.2f}, {high:.2f}]{apart if len(found) > 1 else ''}"
    return cells


def _over_documents(observations: Sequence[Any]) -> tuple[float, float, float]:
    having = [o for o in observations if o[2]]
    return mean_interval([o[1] for o in having], [o[2] for o in having], [o[0] for o in having])


def costs() -> dict[int, Ratio]:
    """Time of an update's forward and backward pass over that of plain cross-entropy, by d."""
    model: Any = longctx.load("demo")[0]
    longctx.extend_all(model, longctx.parse_methods(METHOD))
    ids = torch.randint(3, 1000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = Collator()([{"input_ids": row, "labels": row} for row in ids.tolist()])
    call = {name: batch[name] for name in ("labels", "document_ids")} | unpacked_inputs(batch)
    count = torch.tensor([ROWS * (LENGTH - 1)])

    def update(losses: Losses) -> Callable[[], None]:
        def run() -> None:
            loss_forward = LossForward.on(model, losses)
            model(**call, count=count).backward()
            loss_forward.remove()
            model.zero_grad()

        return run

    plain = update(Losses())
    return {
        step: paired_ratio(plain, update(Losses(long_ce=LongCE(SHORT, step))), rounds=9, warmup=1)
        for step in STEPS
    }


def main() -> None:
    """Train what is not there, measure, write."""
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "longctx-long-ce")
    runs.mkdir(parents=True, exist_ok=True)
    rows = [row(f"not trained, {METHOD}", [figures_of(runs, "none", 0)])]
    found = {(name, seed): figures_of(runs, name, seed) for seed in SEEDS for name in LOSSES}
    rows += [row(name, [found[name, seed] for seed in SEEDS]) for name in LOSSES]
    keys = sum(o[2] for o in figures_of(runs, "none", 0)[f"longppl@{LENGTH}"])
    ratios = costs()
    speed = ROWS * LENGTH / ratios[STEPS[0]].base_seconds
    cost = "; ".join(f"d = {step}: {ratio}" for step, ratio in ratios.items())
    write_results(
        "LongCE: cost and effect",
        "python -m benchmarks.long_ce",
        rows,
        f"The embedded model under {METHOD}, {UPDATES} updates of {ROWS} rows of {LENGTH:,} tokens "
        f"of the training documents, learning rate {RATE:g}; both losses see the same rows. "
        f"LongCE: K = {SHORT}, d = {STEP}, γ = 5, chosen beforehand. Keys: 50 prompts a cell, "
        "Wilson's interval as if all were independent. Perplexity of the last 128 tokens of ten "
        f"windows, LongPPL over {keys} key tokens of ten windows that the untrained model finds "
        f"under {EVALUATOR} (K = 128, α = 1, β = −2), intervals: t over held-out documents; seeds "
        f"{', '.join(map(str, SEEDS))} together, and apart in brackets. Time of a forward and "
        f"backward pass with LongCE over plain ({speed:,.0f} tokens/s), K = {SHORT}: {cost}.",
    )


if __name__ == "__main__":
    main()
