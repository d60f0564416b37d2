"""What conversions of weights cost, and what uptraining gives back.

heads: the embedded model from 2 key/value heads to 1, averaged plainly and aligned, taught by its
original on text and keys, on text alone, and with the weights of the attention alone; SmolLM2-135M
from 3 to 1, where its checkpoint's folder is given. linear: the embedded model under features
alone, a window alone, both, and each with the layers kept that keys need most. windows: SmolLM2
with a window in all layers but those, and in all but as many others. mixture: experts out of
SmolLM2, and how their load moves. Runs are kept in the folder RUNS and not trained twice.

    python -m benchmarks.conversions [RUNS] [--smollm2 FOLDER] [--model demo] [--parts linear …]
"""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from tyro.conf import Positional

import longctx
from longctx.eval import Passkey, Perplexity, sweep
from longctx.model import evaluating, window
from longctx.patches.moe import Moe
from longctx.patches.multi_query import MultiQuery
from longctx.patches.sliding_window import SlidingWindow
from longctx.prompts.haystacks import encode, held_out
from longctx.train.loss.load_balance import LoadBalance, expert_load
from longctx.train.loss.objective import Losses
from longctx.train.recipes import UPTRAIN, Recipe
from longctx.train.run import Run

from ._measure import write_results

COMMAND = "python -m benchmarks.conversions RUNS --smollm2 SMOLLM2"
MANY, FEW = 100, 40
Part = Literal["heads", "linear", "windows", "mixture"]

DEMO = replace(
    UPTRAIN,
    max_length=256,
    training=replace(
        UPTRAIN.training, max_steps=240, batch_size=16, learning_rate=2e-3, weight_decay=0.1
    ),
)
SHORT = replace(DEMO, training=replace(DEMO.training, max_steps=60))
SMOLLM2 = replace(
    UPTRAIN,
    max_length=256,
    training=replace(UPTRAIN.training, max_steps=60, batch_size=4, learning_rate=5e-4, warmup=6),
)
MIXED = Recipe(
    method="none",
    max_length=256,
    losses=Losses(load_balance=LoadBalance(0.01)),
    training=replace(UPTRAIN.training, max_steps=20, batch_size=1, learning_rate=1e-4, warmup=5),
)
WINDOW = 64
SMALL: list[tuple[str, bool | None, Recipe | None]] = [
    ("original", None, None),
    (
        "original, trained shortly without a teacher",
        None,
        replace(SHORT, losses=Losses()),
    ),
    ("averaged", False, None),
    ("aligned", True, None),
    ("aligned, trained", True, DEMO),
    ("averaged, trained shortly", False, SHORT),
    ("aligned, trained shortly", True, SHORT),
    ("aligned, trained shortly on text alone", True, replace(SHORT, retrieval=0.0)),
    ("aligned, attention trained shortly", True, replace(SHORT, trained_weights="attention")),
    ("aligned, trained shortly without the teacher", True, replace(SHORT, losses=Losses())),
]
LARGE: list[tuple[str, bool | None, Recipe | None]] = [
    ("original", None, None),
    ("original, trained without a teacher", None, replace(SMOLLM2, losses=Losses())),
    ("averaged", False, None),
    ("aligned", True, None),
    ("aligned, trained", True, SMOLLM2),
]


def trained(
    name: str,
    model: PreTrainedModel,
    recipe: Recipe,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    runs: Path,
) -> tuple[PreTrainedModel, str]:
    """The model of a run, trained now if it is not there, and the seconds of one core it took."""
    folder, said = runs / name, runs / f"{name}.seconds"
    if not (folder / "model").exists():
        run = Run(recipe, ("manual",), folder)
        begin = time.process_time()
        run.extend(model)
        run.start(model, tokenizer, teacher=teacher, resume=True)
        said.write_text(f"{time.process_time() - begin:.0f}")
    return longctx.load(folder / "model")[0], said.read_text()


def figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: list[int],
    prompts: int,
    windows: int = 20,
) -> dict[str, str]:
    tasks = [Passkey(samples=prompts), Perplexity(windows=windows)]
    result = sweep(model, tokenizer, tasks, lengths)
    rows: dict[Any, float] = {(row.task, row.length): row.value for row in result.rows}
    found: dict[str, str] = {}
    for length in lengths:
        found[f"NLL at {length}"] = f"{math.log(rows['perplexity', length]):.3f}"
        found[f"passkeys of {prompts} at {length}"] = f"{rows['passkey', length]:.0%}"
    return found


def heads(
    source: str,
    runs: Path,
    kv_heads: int,
    prompts: int,
    variants: list[tuple[str, bool | None, Recipe | None]],
) -> None:
    """One table: a model as it comes, and of fewer heads before and after training."""
    original, tokenizer = longctx.load(source)
    rows: list[dict[str, str]] = []
    length = min(window(original) or 256, 256)

    def add(name: str, model: PreTrainedModel, cache: int, seconds: str, tokens: int) -> None:
        told = {
            "tokens trained": f"{tokens:,}",
            "CPU seconds": seconds,
            "cache bytes / token": str(cache),
        }
        rows.append({"model": name, **figures(model, tokenizer, [length], prompts), **told})
        print(rows[-1], flush=True)

    for name, align, recipe in variants:
        made = longctx.convert(original, MultiQuery(kv_heads, bool(align)), tokenizer=tokenizer)
        before, cache = made.report().cache
        start = made.model
        if align is None:  # the control, which keeps its heads
            start, cache = copy.deepcopy(original), before
        if recipe is None:
            add(name, start, cache, "", 0)
            continue
        teacher = original if recipe.losses.distillation else None
        key = f"{Path(source).name}-{name}".replace(", ", "-").replace(" ", "-")
        model, seconds = trained(key, start, recipe, teacher, tokenizer, runs)
        tokens = (recipe.training.max_steps or 0) * recipe.training.batch_size * recipe.max_length
        add(name, model, cache, seconds, tokens)
    size = original.config.num_key_value_heads
    write_results(
        f"Fewer key/value heads: {Path(source).name}, {size} to {kv_heads}",
        COMMAND,
        rows,
        "NLL in nats per token of the held-out documents of Python's manual, passkeys in filler "
        "sentences and in that text, keys that training never asks for. Training: the manual's "
        "other documents, the teacher's logits and the text in equal parts, a quarter of it keys "
        "hidden in text, where the row does not say otherwise. Part of any gain is plain further "
        "training on this kind of text. One seed.",
    )


def load(model: PreTrainedModel, ids: torch.Tensor, active: int) -> str:
    """The smallest and largest share of all choices that an expert of any layer gets."""
    with evaluating(model), torch.no_grad():
        routed: Any = model(input_ids=ids, output_router_logits=True, use_cache=False)
    shares = torch.stack([expert_load(logits, active) for logits in routed.router_logits])
    mean = " ".join(f"{share:.0%}" for share in shares.mean(0))
    return f"{mean} (layers: {shares.min():.0%} to {shares.max():.0%})"


def linear(source: str, runs: Path) -> None:
    """One table: a model as it comes, and with bounded caches before and after training."""
    original, tokenizer = longctx.load(source)
    rows: list[dict[str, str]] = []
    lengths, short = [256, 512], replace(SHORT, training=replace(SHORT.training, max_steps=30))
    both = f"linear_attention:window={WINDOW}"
    variants = {
        "window and features": both,
        "the same, 2 layers kept": f"{both},keep=auto:2",
        "the same, 1 layer kept": f"{both},keep=auto:1",
        f"window of {WINDOW} alone": f"sink_window:sinks=0,window={WINDOW}",
        "features alone": "linear_attention:window=0",
        "window alone, 2 layers kept": f"sliding_window:window={WINDOW},keep=auto:2",
        "window alone, 1 layer kept": f"sliding_window:window={WINDOW},keep=auto:1",
    }

    def add(name: str, model: PreTrainedModel, seconds: str, tokens: int, cache: str) -> None:
        told = {"tokens trained": f"{tokens:,}", "CPU seconds": seconds, "cache bytes": cache}
        kept = runs / f"{Path(source).name}-{name}.json".replace(", ", "-").replace(" ", "-")
        if not kept.exists():
            kept.write_text(json.dumps(figures(model, tokenizer, lengths, MANY)))
        rows.append({"model": name, **json.loads(kept.read_text()), **told})
        print(rows[-1], flush=True)

    token = longctx.convert(original, "multi_query:1", tokenizer=tokenizer).report().cache[0]
    add("original", original, "", 0, f"{token:,} a token")
    for name, method in variants.items():
        recipe = short
        if method.startswith("sink_window"):
            recipe = replace(short, method=method)
            start = copy.deepcopy(original)
            with longctx.extend(start, method):
                cache = f"{WINDOW * token:,}"
                add(name, start, "", 0, cache)
        else:
            made = longctx.convert(original, method, tokenizer=tokenizer)
            start, report = made.model, made.report()
            print(report, flush=True)
            cache = f"{report.cache[1]:,} a token + {report.bounded[1]:,}"
            cache = cache.removeprefix("0 a token + ")
            add(name, start, "", 0, cache)
        key = f"{Path(source).name}-{name}".replace(", ", "-").replace(" ", "-")
        model, seconds = trained(key, start, recipe, original, tokenizer, runs)
        steps, batch = recipe.training.max_steps or 0, recipe.training.batch_size
        add(f"{name}, trained", model, seconds, steps * batch * recipe.max_length, cache)
    write_results(
        f"Linear attention: {Path(source).name}",
        f"{COMMAND} --parts linear --model {Path(source).name}",
        rows,
        "NLL in nats per token of the held-out documents of Python's manual, passkeys in filler "
        "sentences and in that text. Features are fitted layer by layer on 4,096 tokens of the "
        "manual's other documents (attention transfer), also where nothing is trained; training "
        "is `--recipe uptrain` on rows of 256 tokens. Kept layers are those whose replacement "
        "costs keys most. Cache bytes of a row: for each token, and whatever the length. One seed.",
    )


def windows(source: str, runs: Path) -> None:
    """One table: a model as it comes, and with windows in chosen and in other layers."""
    original, tokenizer = longctx.load(source, dtype="bfloat16")
    layers = original.config.num_hidden_layers
    rows: list[dict[str, str]] = []

    def add(name: str, model: PreTrainedModel, cache: str) -> None:
        kept = runs / f"{Path(source).name}-{name}.json".replace(", ", "-").replace(" ", "-")
        if not kept.exists():
            kept.write_text(json.dumps(figures(model, tokenizer, [4096], FEW // 2, windows=8)))
        rows.append({"model": name, **json.loads(kept.read_text()), "cache bytes": cache})
        print(rows[-1], flush=True)

    count = 10
    chosen = longctx.convert(
        original, SlidingWindow(window=512, keep=f"auto:{count}"), tokenizer=tokenizer
    )
    report = chosen.report()
    print(report, flush=True)
    even = tuple(range(layers // count - 1, layers, layers // count))
    spread = longctx.convert(original, SlidingWindow(window=512, keep=even))
    cache = f"{report.cache[1]:,} a token + {report.bounded[1]:,}"
    add("original", original, f"{report.cache[0]:,} a token")
    add(f"{count} of {layers} layers see all, chosen", chosen.model, cache)
    add(f"{count} of {layers} layers see all, evenly spread", spread.model, cache)
    write_results(
        f"Windows in chosen layers: {Path(source).name}",
        f"{COMMAND} --parts windows",
        rows,
        "All other layers see the last 512 tokens; nothing is trained; bfloat16. NLL in nats per "
        "token of 8 windows of the held-out documents of Python's manual, passkeys in filler "
        "sentences and in that text. Layers are chosen by keys hidden in the manual's other "
        "documents, at 2,048 tokens. Cache bytes of a row: for each token, and whatever the "
        "length.",
    )


def mixture(source: str, runs: Path) -> None:
    """One table: a dense model, the mixture made of it, and that after a few updates."""
    original, tokenizer = longctx.load(source)
    method = Moe(experts=4, active=2)
    made = longctx.convert(original, method)
    text = encode(tokenizer, held_out().documents[0])[:512]
    ids = torch.tensor([text])
    rows: list[dict[str, str]] = []

    def add(name: str, model: PreTrainedModel, shares: str) -> None:
        sizes = f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M"
        result = sweep(model, tokenizer, [Perplexity(windows=4)], [MIXED.max_length])
        nats = f"{math.log(result.rows[0].value):.4f}"
        key = f"NLL at {MIXED.max_length}"
        rows.append({"model": name, key: nats, "parameters": sizes, "load of the experts": shares})
        print(rows[-1], flush=True)

    add("original", original, "")
    add(str(method), made.model, load(made.model, ids, method.active))
    model, _ = trained("moe", made.model, MIXED, None, tokenizer, runs)
    updates = MIXED.training.max_steps or 0
    read = updates * MIXED.training.batch_size * MIXED.max_length
    add(f"the same, {updates} updates", model, load(model, ids, method.active))
    write_results(
        f"Experts out of a dense model: {Path(source).name}",
        COMMAND,
        rows,
        f"Held-out documents of Python's manual; trained on {read:,} tokens of "
        "the others, load balance weighted 0.01. The load is each expert's share of all "
        "choices, averaged over layers, with the extremes over all layers.",
    )


@dataclass(frozen=True)
class Conversions:
    """Train what is not there, measure all."""

    runs: Positional[Path] = Path("longctx-conversions")
    """Folder of the runs."""
    smollm2: str | None = None
    """Folder of SmolLM2-135M; without it its parts are left out."""
    model: str = "demo"
    """The small model."""
    parts: tuple[Part, ...] = get_args(Part)

    def run(self) -> None:
        """Write the tables."""
        self.runs.mkdir(parents=True, exist_ok=True)
        if "heads" in self.parts:
            heads(self.model, self.runs, 1, MANY, SMALL)
            if self.smollm2:
                heads(self.smollm2, self.runs, 1, FEW, LARGE)
        if "linear" in self.parts:
            linear(self.model, self.runs)
        if "windows" in self.parts and self.smollm2:
            windows(self.smollm2, self.runs)
        if "mixture" in self.parts and self.smollm2:
            mixture(self.smollm2, self.runs)


if __name__ == "__main__":
    tyro.cli(Conversions).run()
