"""Fewer heads, and back: the embedded model with one key/value head, taught by its original."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import longctx
from longctx.eval import Passkey, Perplexity, sweep
from longctx.train.recipes import UPTRAIN
from longctx.train.run import Run


def figures(model: Any, tokenizer: Any) -> tuple[float, float]:
    """NLL in nats per token, and the share of keys found, at 256 tokens."""
    tasks = [Perplexity(windows=20), Passkey(samples=40)]
    result = sweep(model, tokenizer, tasks, [256], single_process=True, progress=False)
    rows: dict[Any, float] = {row.task: row.value for row in result.rows}
    return math.log(rows["perplexity"]), rows["passkey"]


@pytest.mark.slow
def test_one_head_comes_back_to_two(tmp_path: Path) -> None:
    """On 983k tokens, in 4 minutes of a core: text, and keys, which text alone does not give."""
    original, tokenizer = longctx.load("demo")
    nats, keys = figures(original, tokenizer)
    made = longctx.convert(original, "multi_query:1", tokenizer=tokenizer)
    assert made.report().cache == (2_048, 1_024)
    start, lost = figures(made.model, tokenizer)
    assert nats + 0.2 < start < nats + 0.4  # 0.8 without the alignment
    assert lost < 0.5
    training = replace(
        UPTRAIN.training, max_steps=240, batch_size=16, learning_rate=2e-3, weight_decay=0.1
    )
    recipe = replace(UPTRAIN, max_length=256, training=training)
    run = Run(recipe, ("manual",), tmp_path / "run")
    done = run.start(made.model, tokenizer, teacher=original, progress=False)
    after, found = figures(done.model, tokenizer)
    assert after <= nats + 0.01
    assert found >= 0.9 * keys
    plain: Any = AutoModelForCausalLM.from_pretrained(done.saved.path, dtype=torch.float32)
    ids = torch.arange(60)[None] * 7
    assert torch.equal(plain(ids).logits, done.model(ids).logits)
