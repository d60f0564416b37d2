"""Keys found beyond the length of the training: `python -m benchmarks.trained_short [RUNS]`.

The embedded model is trained for 200 updates of 4,096 tokens: on rows of its own window without a
method, on rows of twice the window under dual chunk attention with log-n scaling, and under
linear:8 by PoSE. Each is then read at up to 64 windows, beside the untrained model and
`demo-tuned`. Runs and sweeps are kept in the folder RUNS (longctx-trained-short); what is there is
not made again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import longctx
from longctx.eval import Passkey, sweep
from longctx.patch import patch_of
from longctx.train.recipes import EMBEDDED, Recipe
from longctx.train.run import Run

from ._measure import write_results

SEEDS = (1, 2, 3)
PROMPTS = 100
SHORT, LONG = (256, 512, 1_024, 2_048), (4_096, 8_192, 16_384)
TASK = Passkey(samples=PROMPTS, seed=11, chat=False)
REMAPPED = "dual_chunk:factor=64,log_n=True"
SHIPPED = {"demo": 0, "demo-tuned": 4_000_000}  # tokens of training
_TRAINING = replace(EMBEDDED.training, max_steps=200, learning_rate=1e-3)


@dataclass(frozen=True, slots=True)
class Reader:
    """A model that is read in one way."""

    trained: str
    """What training it had."""
    name: str
    """Its folder in RUNS, or a model that ships with longctx."""
    recipe: Recipe | None
    read: str | None
    """The method put on it to be read; "none" leaves the one that it was trained under, and None
    takes that off."""
    said: str
    """The same, in the table."""
    lengths: tuple[int, ...]


def readers() -> Iterator[Reader]:
    """All rows of the table."""
    yield Reader("not at all", "demo", None, "none", "as it is", SHORT)
    yield Reader("not at all", "demo", None, REMAPPED, f"`{REMAPPED}`", SHORT + LONG)
    yield Reader(
        "`linear:8` (`demo-tuned`)", "demo-tuned", None, "none", "its own method", SHORT + LONG
    )
    on_top = "dual_chunk:factor=8,log_n=True"
    yield Reader(
        "`linear:8` (`demo-tuned`)", "demo-tuned", None, on_top, f"`{on_top}` on top", SHORT + LONG
    )
    for seed in SEEDS:
        training = replace(_TRAINING, seed=seed)
        own = replace(training, batch_size=16)
        plain = replace(EMBEDDED, method="none", max_length=256, positions="full", training=own)
        for read, said, lengths in (
            ("none", "as it is", SHORT),
            (REMAPPED, f"`{REMAPPED}`", SHORT + LONG),
        ):
            yield Reader("rows of 256, no method", f"plain{seed}", plain, read, said, lengths)
        under = replace(plain, method=REMAPPED, max_length=512, training=replace(own, batch_size=8))
        rows = f"rows of 512 under `{REMAPPED}`"
        yield Reader(rows, f"under{seed}", under, "none", "the same", SHORT + LONG)
        yield Reader(rows, f"under{seed}", under, None, "no method", SHORT)
        pose = replace(EMBEDDED, positions="pose", window=512, training=training)
        rows = "`linear:8`, PoSE on 512 tokens"
        yield Reader(rows, f"pose{seed}", pose, "none", "its own method", SHORT)


def trained(reader: Reader, runs: Path) -> tuple[str | Path, int, float]:
    """The model of a row, trained now if it is not there, its tokens and minutes of training."""
    if reader.recipe is None:
        return reader.name, SHIPPED[reader.name], math.nan
    folder = runs / reader.name
    if not (folder / "model").exists():
        model, tokenizer = longctx.load("demo")
        run = Run(reader.recipe, ("manual", "sample"), folder, template="vicuna")
        run.extend(model)
        run.start(model, tokenizer, resume=True)
    last = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return folder / "model", last["tokens"], last["train_runtime"] / 60


def main() -> None:
    """Train and read what is missing, write the table."""
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "longctx-trained-short")
    table: dict[tuple[str, str], dict[str, str]] = {}
    for reader in readers():
        source, tokens, minutes = trained(reader, runs)
        model, tokenizer = longctx.load(source)
        kept = "read"
        if reader.read is None:
            kept = "read-plain"
            patch = patch_of(model)
            assert patch is not None
            patch.remove()
        results = runs / f"{reader.name}-{kept}" / "results.jsonl"
        results.parent.mkdir(parents=True, exist_ok=True)
        found = sweep(
            model, tokenizer, TASK, reader.lengths, methods=[reader.read], results=results
        ).rows
        row = table.setdefault((reader.trained, reader.said), {})
        cells = {f"{r.length:,}": f"{r.value * PROMPTS:.0f}" for r in found}
        figures = {
            "tokens": f"{tokens / 1e6:.1f} M",
            "minutes": "" if math.isnan(minutes) else f"{minutes:.0f}",
            **{f"{n:,}": cells.get(f"{n:,}", "") for n in SHORT + LONG},
            "far": f"{sum(r.far_found or 0 for r in found)} of {sum(r.far or 0 for r in found)}",
        }
        for column, figure in figures.items():
            before = row.get(column)
            row[column] = f"{before}, {figure}" if before and figure else before or figure
        print(reader.name, reader.read, figures, flush=True)
    write_results(
        "Trained short, read long",
        "python -m benchmarks.trained_short",
        [{"trained": t, "read under": r, **row} for (t, r), row in table.items()],
        f"Keys found of {PROMPTS}, by tokens of the prompt; three seeds of training where three "
        "figures stand. far: keys that end 256 tokens or more back from the answer, at all lengths "
        "together. Tokens and minutes are of training, the minutes beside other work. Two fifths "
        "of a training hide keys of its own in text.",
    )


if __name__ == "__main__":
    main()
