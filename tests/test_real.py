"""On a real LLaMA, SmolLM2-135M from GGUF. Run with `pytest -m real`; see README, "Real models"."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import longctx
from longctx.checkpoint import load

ROOT = Path(os.environ.get("LONGCTX_REAL", Path.home() / ".cache/longctx-real"))
GGUF = ROOT / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not GGUF.exists(), reason=f"{GGUF} is not there"),
]


def test_extended_saved_and_reloaded_by_plain_transformers(tmp_path: Path) -> None:
    model, tokenizer = load(GGUF, device="cpu")
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt").input_ids
    before = model(ids).logits
    patch = longctx.extend(model, "yarn", target=16_384)
    wanted = model(ids).logits
    assert longctx.save(model, tokenizer, tmp_path / "out").plain
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.max_position_embeddings == 16_384
    assert torch.equal(plain(ids).logits, wanted)
    patch.remove()
    assert torch.equal(model(ids).logits, before)


def test_digits_are_tokens_of_their_own_as_in_the_original() -> None:
    """SmolLM2's tokenizer.json cuts text by Digits(individual_digits=True), then as GPT-2 does."""
    tokenizer: Any = longctx.load(GGUF, device="cpu")[1]
    for text in ("2024", "In 2024, 65,536 tokens.", "x86_64 and 0x10000"):
        pieces = [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]
        assert "".join(pieces) == text
        assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece)), pieces


def test_it_still_speaks() -> None:
    loaded: Any = load(GGUF, device="cpu")
    model, tokenizer = loaded
    longctx.extend(model, "yarn", factor=2)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
