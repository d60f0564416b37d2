"""Keys survive decodings that claim it, and do not survive transformers' own penalties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import longctx
from longctx.generation.presets import PRESETS
from longctx.generation.registry import parse_decoding
from longctx.prompts import held_out, passkey
from longctx.prompts.assembly import Prompt

LENGTH, DIGITS = 512, 8
DECODINGS = (*longctx.available_decodings(), *PRESETS)
KEEPING = [name for name in DECODINGS if parse_decoding(name).keeps_keys]


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return longctx.load("demo-tuned")


def prompts(tokenizer: Any, count: int) -> list[Prompt]:
    hay = held_out()
    return [
        passkey(tokenizer, LENGTH, depth=(i + 0.5) / count, seed=i, haystack=hay)
        for i in range(count)
    ]


def found(asked: Sequence[Prompt], texts: Sequence[str]) -> int:
    return sum(each.key in text for each, text in zip(asked, texts, strict=True))


def ours(demo: tuple[Any, Any], asked: Sequence[Prompt], decoding: str, guard: Any = None) -> int:
    ids = [list(each.input_ids[: each.answer_start]) for each in asked]
    said = longctx.generate(*demo, ids, decoding=decoding, guard=guard, max_new_tokens=DIGITS)
    return found(asked, said.texts)


def theirs(demo: tuple[Any, Any], asked: Sequence[Prompt], **settings: Any) -> int:
    model, tokenizer = demo
    texts: list[str] = []
    for each in asked:
        ids = torch.tensor([each.input_ids[: each.answer_start]])
        config = GenerationConfig(
            max_new_tokens=DIGITS, do_sample=False, pad_token_id=0, **settings
        )
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :]))
    return found(asked, texts)


def test_keys_survive_what_claims_it(demo: tuple[Any, Any]) -> None:
    asked = prompts(demo[1], 4)
    greedy = ours(demo, asked, "greedy")
    assert greedy >= 3
    for decoding in KEEPING:
        for guard in (None, "ban") if parse_decoding(decoding).beams else (None, "ban", "mend"):
            assert ours(demo, asked, decoding, guard) >= greedy - 1, (decoding, guard)
    assert theirs(demo, asked, no_repeat_ngram_size=3) == 0
    assert theirs(demo, asked, no_repeat_ngram_size=4) == 0
    assert ours(demo, asked, "no_repeat:ngram=3") == greedy
    assert ours(demo, asked, "dry:include_prompt=True") < greedy


def test_presets_for_retrieval_keep_keys_by_their_settings() -> None:
    preset: Any = PRESETS["retrieval"]
    assert preset.name in ("no_repeat", "dry")
    assert preset.keeps_keys
    assert getattr(preset, "ngram", 3) >= 3
    assert not getattr(preset, "include_prompt", False)
    assert not preset.temperature
