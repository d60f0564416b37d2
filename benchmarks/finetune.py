"""What fine-tuning gives the embedded model: `python -m benchmarks.finetune MANUAL [RUNS] [SEEDS]`.

The recipe of `longctx demo --train` under linear and YaRN interpolation and under PoSE, and as a
control without interpolation; then passkeys and perplexity over lengths, and what the context
before the old window is worth: the same 256 tokens of a document, read after 256 and after 1,792
tokens of it; all of them, and those of names that only the long context has. Runs are kept in the
folder RUNS (longctx-finetune) and not trained twice; linear and the control are trained with SEEDS
seeds (3). MANUAL is a folder with the sources of Python's manual (*.rst.txt, Debian's python3-doc),
of which the documents count that neither the training nor the package's held-out text has.
"""

from __future__ import annotations

import json
import lzma
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import longctx
from longctx.eval import Passkey, Perplexity, sweep
from longctx.eval.stats.intervals import mean_interval
from longctx.eval.tasks.shared.texts import documents_of, spread
from longctx.prompts.haystacks import Texts, bos_of
from longctx.scoring.token_scores import score
from longctx.train.recipes import EMBEDDED, Recipe
from longctx.train.run import Run

from ._measure import write_results

LENGTHS = (256, 512, 1024, 2048)
PROMPTS = 100
TARGETS = 256
WINDOWS = 2  # of each document
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{4,}")


def variants(seeds: int = 3) -> list[tuple[str, Recipe]]:
    found: list[tuple[str, Recipe]] = []
    for method in ("linear:8", "none"):
        for seed in range(seeds):
            training = replace(EMBEDDED.training, seed=seed)
            found.append(
                (f"{method}, seed {seed}", replace(EMBEDDED, method=method, training=training))
            )
    found.append(("yarn:8, seed 0", replace(EMBEDDED, method="yarn:8")))
    pose = replace(EMBEDDED, positions="pose", window=512)
    found.append(("linear:8, PoSE on 512, seed 0", pose))
    return found


def trained(name: str, recipe: Recipe, runs: Path) -> PreTrainedModel:
    """The model of a run, trained now if it is not there."""
    folder = runs / name.replace(", ", "-").replace(" ", "-").replace(":", "")
    if not (folder / "model").exists():
        model, tokenizer = longctx.load("demo")
        run = Run(recipe, ("manual", "sample"), folder, template="vicuna")
        if recipe.method == "none":  # the window is what the config says, the positions are plain
            model.config.max_position_embeddings = recipe.max_length
        run.extend(model)
        run.start(model, tokenizer, resume=True)
    return longctx.load(folder / "model")[0]


def unseen(manual: Path) -> Texts:
    """The documents of the manual that are in no text of the package, by their names."""
    known: set[str] = set()
    for file in ("held_out.json.xz", "held_in.json.xz"):
        known |= {*json.loads(lzma.decompress((files("longctx") / "demo" / file).read_bytes()))}
    paths = {str(p.relative_to(manual)): p for p in sorted(manual.rglob("*.rst.txt"))}
    return Texts(
        tuple(
            path.read_text(encoding="utf-8")
            for name, path in paths.items()
            if name.removesuffix(".rst.txt") not in known
        )
    )


def context_gain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts
) -> tuple[str, str, int]:
    """ΔNLL per token of the same targets with the long and with the short context, by document.

    Of all targets, and of those in `returning` names.
    """
    documents = documents_of(tokenizer, texts)
    bos = bos_of(tokenizer)
    size = LENGTHS[-1] - len(bos)
    sizes = {name: len(ids) for name, ids in documents.items() if len(ids) >= size}
    places = spread(sizes, size, WINDOWS * len(sizes))
    found: list[tuple[str, float, float, int]] = []  # document, sum over all, over names, names
    for name, first in places:
        ids = documents[name][first : first + size]
        nll: list[torch.Tensor] = []
        for context in (size - TARGETS, TARGETS):
            piece = torch.tensor([[*bos, *ids[size - TARGETS - context :]]])
            scored = score(model, piece, start=piece.shape[1] - TARGETS)
            nll.append(scored.nll.double().flatten())
        change, names = nll[0] - nll[1], returning(tokenizer, ids)
        found.append((name, float(change.sum()), float(change[names].sum()), int(names.sum())))
    clusters, sums, sums_of_names, counts = zip(*found, strict=True)
    said = [
        mean_interval(sums, [TARGETS] * len(found), clusters),
        mean_interval(sums_of_names, counts, clusters),
    ]
    everywhere, in_names = (f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in said)
    return everywhere, in_names, len(sizes)


def returning(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> torch.Tensor:
    """Which of the last 256 tokens spell a name that comes back after a while, bool [256].

    Names are words of five characters or more; such a one occurs before the last 512 tokens, and
    not between there and the place where it is counted.
    """
    far = {*_NAME.findall(str(tokenizer.decode(list(ids[: -2 * TARGETS]))))}
    near = {*_NAME.findall(str(tokenizer.decode(list(ids[-2 * TARGETS : -TARGETS]))))}
    ends: list[int] = []
    text = ""
    for token in ids[-TARGETS:]:
        text += str(tokenizer.decode([token]))
        ends.append(len(text))
    starts = [0, *ends[:-1]]
    marked = torch.zeros(TARGETS, dtype=torch.bool)
    for match in _NAME.finditer(text):
        if match.group() in far and match.group() not in near:
            for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
                marked[place] |= start < match.end() and end > match.start()
        near.add(match.group())
    return marked


def measured(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts
) -> dict[str, str]:
    tasks = [Passkey(samples=PROMPTS), Perplexity(windows=20)]
    result = sweep(model, tokenizer, tasks, LENGTHS)
    everywhere, in_names, documents = context_gain(model, tokenizer, texts)
    rows: dict[Any, float] = {(row.task, row.length): row.value for row in result.rows}
    return {
        "model": name,
        f"passkeys of {PROMPTS} at {' / '.join(f'{n:,}' for n in LENGTHS)}": " / ".join(
            f"{rows['passkey', n]:.0%}" for n in LENGTHS
        ),
        "perplexity there": " / ".join(f"{rows['perplexity', n]:.1f}" for n in LENGTHS),
        "ΔNLL by 1,792 instead of 256 tokens before [95%]": everywhere,
        "the same, names not seen for 256 tokens": in_names,
        "documents": f"{documents}",
    }


def main() -> None:
    """Train what is not there, measure all."""
    given = sys.argv[1:]
    texts = unseen(Path(given[0])) if given else Texts(())
    if len(texts.documents) < 100:
        raise SystemExit(f"{__doc__}\n{len(texts.documents)} such documents in {given[:1]}.")
    runs = Path(given[1] if len(given) > 1 else "longctx-finetune")
    base, tokenizer = longctx.load("demo")
    rows = [measured("embedded, as it comes", base, tokenizer, texts)]
    for name, recipe in variants(int(given[2]) if len(given) > 2 else 3):
        rows.append(measured(name, trained(name, recipe, runs), tokenizer, texts))
        print(rows[-1], flush=True)
    write_results(
        "Fine-tuning: the embedded model to 2,048 tokens",
        "python -m benchmarks.finetune MANUAL",
        rows,
        f"{EMBEDDED.training.max_steps} updates of 4,096 tokens: {EMBEDDED.retrieval:.0%} of the "
        "training hides keys of the training split in text of the training documents, the rest is "
        "that text and synthetic conversations. Perplexity on the ten held-out documents of "
        "Python's manual, passkeys in filler sentences and in that text. ΔNLL (nats per token, "
        f"interval by document) of the last {TARGETS} tokens of at most {WINDOWS} windows of every "
        "document of the manual that is in neither text; names: tokens of words that occur in the "
        "long context and not in the short one. The control (none) sees the same rows. Part of any "
        "gain in perplexity is plain further training.",
    )


if __name__ == "__main__":
    main()
