"""On a CUDA device: placement, precision and agreement with the CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import longctx
from longctx.checkpoint import load
from longctx.model import rotary_of
from longctx.rope import frequencies_of

from .families import build, tokens
from .test_matrix import FAMILIES, demo_tokenizer, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", longctx.available())
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gpu_agrees_with_the_cpu(family: str, name: str) -> None:
    model, ids = build(family), tokens(100)
    with longctx.extend(model, settings(name)), torch.no_grad():
        wanted = model(ids).logits
    model.to("cuda")
    with longctx.extend(model, settings(name)) as patch, torch.no_grad():
        assert patch.report().ok, str(patch.report())
        found = model(ids.cuda()).logits.cpu()
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", longctx.available())
def test_generation_in_bfloat16(name: str) -> None:
    model = build("llama").to("cuda", torch.bfloat16)
    with longctx.extend(model, settings(name)):
        out = model.generate(tokens(80).cuda(), max_new_tokens=4, min_new_tokens=4)
    assert out.shape == (1, 84)


def test_auto_is_bfloat16_on_the_gpu_with_float32_frequencies(tmp_path: Path) -> None:
    model = build("llama")
    longctx.extend(model, "yarn", factor=4)
    longctx.save(model, demo_tokenizer(), tmp_path / "x")
    again, _ = load(tmp_path / "x")
    assert again.device.type == "cuda"
    assert again.dtype == torch.bfloat16
    assert frequencies_of(rotary_of(again), None)[0].dtype == torch.float32
    assert again(tokens(100).cuda()).logits.isfinite().all()
