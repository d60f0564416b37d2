"""Shared prefixes against whole prompts and against generation: `python -m benchmarks.sharing`.

Tokens are counted on a model too small to matter, with haystacks of each length's own; times are
the embedded model's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import longctx
from longctx.eval import Passkey, Perplexity
from longctx.prompts.assembly import Prompt
from longctx.scoring.greedy import greedy
from longctx.scoring.prefix_sharing import score_prompts

from ._measure import paired_ratio, write_results

LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)
DEPTHS, HAYSTACKS = 10, 5
BATCH_TOKENS = 16_384
ROUNDS = 5


def nothing_much(vocabulary: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=LENGTHS[-1],
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def counted() -> list[dict[str, str]]:
    """Tokens forwarded for a whole grid of passkeys, and for the perplexity of ten documents."""
    _, tokenizer = longctx.load("demo")
    model = nothing_much(len(tokenizer))
    task = Passkey(samples=DEPTHS * HAYSTACKS, depths=DEPTHS, haystack="text")
    plan = task.plan(tokenizer, LENGTHS, length_invariant=True)
    settings: dict[str, Any] = {"batch_tokens": BATCH_TOKENS, "length_invariant": True}
    keys = sum(task.measure(model, tokenizer, unit, **settings).tokens for unit in plan.units)
    whole = DEPTHS * HAYSTACKS * sum(LENGTHS)
    # The haystack once, and from each of ten depths, evenly from 0 to 1, to its end.
    ideal = HAYSTACKS * (1 + DEPTHS / 2) * sum(LENGTHS)
    text = Perplexity(windows=10)
    lengths = [n for n in LENGTHS if n <= 8192]  # the longest that ten held-out windows have
    windows = text.plan(tokenizer, lengths, length_invariant=True).units
    read = sum(text.measure(model, tokenizer, unit, **settings).tokens for unit in windows)
    return [
        _count(f"passkey, {DEPTHS} depths × {HAYSTACKS} haystacks, 1k–32k", keys, ideal, whole),
        _count(
            f"perplexity, {len(windows)} windows, 1k–8k",
            read,
            len(windows) * lengths[-1],
            len(windows) * sum(lengths),
        ),
    ]


def _count(what: str, tokens: int, ideal: float, whole: int) -> dict[str, str]:
    return {
        "what": what,
        "tokens forwarded": f"{tokens:,}",
        "ideal": f"{ideal:,.0f}",
        "forwarded / ideal": f"{tokens / ideal:.3f}",
        "one prompt, or one length, at a time": f"{whole:,}",
    }


def shared(model: PreTrainedModel, prompts: list[Prompt], *, sharing: bool) -> None:
    score_prompts(
        model,
        [prompt.input_ids for prompt in prompts],
        [prompt.answer_start for prompt in prompts],
        batch_tokens=BATCH_TOKENS,
        length_invariant=sharing,
    )


def generation(model: PreTrainedModel, prompts: list[Prompt]) -> None:
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids[: prompt.answer_start]])
        greedy(model, ids, len(prompt.answer_ids))


def timed(length: int) -> dict[str, str]:
    """The embedded model on ten depths of one haystack."""
    model, tokenizer = longctx.load("demo")
    # With fewer samples than these, a task deals its depths out to several haystacks.
    task = Passkey(samples=DEPTHS * HAYSTACKS, depths=DEPTHS, haystack="text")
    (unit,) = task.plan(tokenizer, [length], length_invariant=True).units
    prompts = [prompt for _, _, prompt in task.cases(tokenizer, unit)][:DEPTHS]
    assert len({prompt.haystack for prompt in prompts}) == 1
    ours = partial(shared, model, prompts, sharing=True)
    whole = partial(shared, model, prompts, sharing=False)
    against_whole = paired_ratio(whole, ours, rounds=ROUNDS, warmup=1)
    against_generation = paired_ratio(
        partial(generation, model, prompts), ours, rounds=ROUNDS, warmup=1
    )
    return {
        "tokens a prompt": f"{length:,}",
        "shared / whole prompts [95%]": str(against_whole),
        "shared / prompt and generate [95%]": str(against_generation),
        "whole prompts (s)": f"{against_whole.base_seconds:.2f}",
    }


def main() -> None:
    """Count tokens and measure time."""
    torch.manual_seed(0)
    write_results(
        "Shared prefixes: tokens",
        "python -m benchmarks.sharing",
        counted(),
        "Haystacks of real text, each length its own. The ideal counts neither needles nor "
        "questions.",
    )
    write_results(
        "Shared prefixes: time",
        "python -m benchmarks.sharing",
        [timed(length) for length in (2048, 8192)],
        f"The embedded model, {DEPTHS} depths of one haystack, {ROUNDS} rounds in turns. Whole "
        f"prompts run in batches of {BATCH_TOKENS:,} tokens, generation one prompt at a time.",
    )


if __name__ == "__main__":
    main()
