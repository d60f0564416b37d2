"""Scoring and a passkey sweep at 32k tokens, against a plain forward pass of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

import longctx
from longctx.checkpoint import load_tokenizer
from longctx.eval import Passkey, sweep
from longctx.scoring.token_scores import score

from ._common import DEVICE, ON_CUDA, Attempts, build_llama, peak_gib, publish, ratio_within, say

LENGTH = 32_768 if ON_CUDA else 512
SHAPE: dict[str, Any] = (
    {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8}
    if ON_CUDA
    else {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2}
)
SAMPLES, DEPTHS = 20, 4
METHODS = ("none", "yarn:2", "alibi")
SECONDS = 8.0 if ON_CUDA else 0.5
SCORED = (
    "tokens a second",
    "scored / plain time [95%]",
    "plain (tokens a second)",
    "peak GiB",
    "peak GiB, plain",
)
SWEPT = ("prompts' tokens a second", "forwarded tokens a second", "forwarded / prompts", "how")


def measure(deadline: float) -> None:
    """One table of scoring, one of sweeping."""
    attempts = Attempts(deadline)
    tokenizer = load_tokenizer("demo")
    extra: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    model = build_llama(LlamaConfig(**SHAPE, **extra))
    size = sum(p.numel() for p in model.parameters()) / 1e9
    say(f"a random LLaMA of {size:.2f} G parameters")
    where = (
        f"A random LLaMA of {size:.2f} G parameters (hidden {SHAPE['hidden_size']}, "
        f"{SHAPE['num_hidden_layers']} layers, {SHAPE['num_attention_heads']} heads over "
        f"{SHAPE['num_key_value_heads']}, vocabulary {len(tokenizer):,}) in bfloat16"
    )
    rows = [
        {"method": name} | attempts.cells(f"NLL, {name}", SCORED, partial(_scored, model, name))
        for name in METHODS
    ]
    publish(
        "scoring",
        "scoring",
        rows,
        f"{where} reads {LENGTH:,} tokens; every token is scored. Plain: the same model without a "
        "method and with the last token's logits alone, in turns.",
    )
    rows = [
        {"method": name}
        | attempts.cells(f"passkeys, {name}", SWEPT, partial(_swept, model, tokenizer, name))
        for name in METHODS
    ]
    publish(
        "scoring",
        "a passkey sweep",
        rows,
        f"{where}; {SAMPLES} prompts of {LENGTH:,} tokens at {DEPTHS} depths, the time that the "
        "records say. The first column is what to set against plain tokens a second.",
    )
    attempts.check()


def _plain(model: PreTrainedModel, ids: Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)


def _scored(model: PreTrainedModel, method: str) -> Sequence[str]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, int(model.config.vocab_size), (1, LENGTH), generator=generator)
    ids = ids.to(DEVICE)

    def scored() -> None:
        if method == "none":
            score(model, ids)
            return
        with longctx.extend(model, method):
            score(model, ids)

    plain = partial(_plain, model, ids)
    ratio = ratio_within(plain, scored, SECONDS)
    base = LENGTH / ratio.base_seconds
    peaks = [f"{peak_gib(run):.2f}" for run in (scored, plain)]
    return (f"{base / ratio.median:,.0f}", str(ratio), f"{base:,.0f}", *peaks)


def _swept(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: str
) -> Sequence[str]:
    task = Passkey(samples=SAMPLES, depths=DEPTHS)
    found = sweep(model, tokenizer, task, [LENGTH], methods=[method], progress=False)
    failed = [record.failed for record in found.records if record.failed]
    if failed:
        raise RuntimeError(failed[0])
    seconds = sum(record.seconds for record in found.records)
    forwarded, prompts = sum(record.tokens for record in found.records), SAMPLES * LENGTH
    return (
        f"{prompts / seconds:,.0f}",
        f"{forwarded / seconds:,.0f}",
        f"{forwarded / prompts:.2f}",
        "; ".join(sorted({record.how for record in found.records})),
    )
