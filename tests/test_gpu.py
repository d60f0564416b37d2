"""On a CUDA device: placement, precision and agreement with the CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import longctx
from longctx.checkpoint import load
from longctx.model import rotary_of
from longctx.rope import frequencies_of
from longctx.train.data.collate import Collator
from longctx.train.engine.loss_forward import LossForward
from longctx.train.engine.packed_attention import packed_attention
from longctx.train.loss.objective import Losses

from .families import WINDOW, build, tokens
from .test_matrix import FAMILIES, LONG, demo_tokenizer, logits, request, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"
every_method = pytest.mark.parametrize("name", longctx.available())


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 2e-3) -> None:
    """Equal up to a share of the largest, wherever they are."""
    error = (found.float().cpu() - wanted.float().cpu()).abs().max().item()
    assert error <= tolerance * wanted.abs().max().item()


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


@every_method
def test_a_patched_model_moves_to_the_gpu_as_a_whole(name: str) -> None:
    model, ids = build("llama"), tokens(LONG)
    with longctx.extend(model, settings(name)) as patch:
        wanted = logits(model, ids)
        model.to(DEVICE)
        found = logits(model, ids.to(DEVICE))
        assert found.device.type == DEVICE
        assert_near(found, wanted)
        assert patch.report().ok, str(patch.report())
    held = [*model.parameters(), *model.buffers()]
    assert {x.device.type for x in held} == {DEVICE}


@every_method
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_decoding_with_a_cache(family: str, name: str, kind: type[Any]) -> None:
    model, ids = build(family).to(DEVICE), tokens(LONG).to(DEVICE)
    room: dict[str, Any] = {"max_cache_len": LONG + 8} if kind is StaticCache else {}
    with longctx.extend(model, settings(name)), request(model, LONG):
        whole = logits(model, ids)
        cache = kind(config=model.config, **room)
        parts = [logits(model, ids[:, :80], past_key_values=cache)]
        parts += [logits(model, ids[:, i : i + 1], past_key_values=cache) for i in range(80, LONG)]
    assert_near(torch.cat(parts, dim=1), whole)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_left_padding_changes_nothing(name: str, dtype: torch.dtype) -> None:
    model = build("llama").to(DEVICE, dtype)
    padding = LONG - 70
    short, long = tokens(70, seed=1), tokens(LONG, seed=2)
    padded = torch.cat([torch.zeros(1, padding, dtype=torch.long), short], dim=1)
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[0, :padding] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with longctx.extend(model, settings(name)), request(model, LONG):
        placed = {key: value.to(DEVICE) for key, value in inputs.items()}
        batch = logits(model, torch.cat([padded, long]).to(DEVICE), **placed)
        tolerance = 2e-3 if dtype == torch.float32 else 0.15
        assert_near(batch[0, padding:], logits(model, short.to(DEVICE))[0], tolerance)
        assert_near(batch[1], logits(model, long.to(DEVICE))[0], tolerance)


@pytest.mark.filterwarnings("default")  # torch.compile, in flex_attention
@pytest.mark.parametrize("name", ["none", "yarn", "alibi"])
@pytest.mark.parametrize("kernel", ["documents", "flex_attention"])
def test_packed_documents_are_kept_apart(
    name: str, kernel: Literal["documents", "flex_attention"]
) -> None:
    if (name, kernel) == ("alibi", "flex_attention"):
        pytest.skip("alibi lives in longctx's attention, which flex_attention would leave out")
    lengths = (37, 5, 40, 29)
    ids = [token for length in lengths for token in tokens(length, seed=length)[0].tolist()]
    batch = Collator()([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}])
    model = build("llama")
    if name != "none":
        longctx.extend(model, settings(name))
    with packed_attention(model, "documents") as packed:
        wanted = logits(model, **_keyed(packed.inputs(batch)))
    model.to(DEVICE)
    placed = {key: value.to(DEVICE) for key, value in batch.items()}
    with packed_attention(model, kernel) as packed:
        assert_near(logits(model, **_keyed(packed.inputs(placed))), wanted)


def _keyed(inputs: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs under the names that `logits` takes."""
    return {"ids" if key == "input_ids" else key: value for key, value in inputs.items()}


def gradients(model: nn.Module, device: str, autocast: bool) -> tuple[float, Tensor]:
    """Loss and flattened gradients of one training step by the chunked loss."""
    ids = tokens(LONG, batch=2).to(device)
    positions = torch.arange(LONG, device=device).expand(2, -1)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    count = torch.tensor([2 * (LONG - 1)], device=device)
    model.to(device).train().zero_grad()
    loss_forward = LossForward.on(model, Losses())
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = model(**inputs, labels=ids, count=count)
    loss.backward()
    loss_forward.remove()
    found = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(found)


@pytest.mark.parametrize("name", ["none", "shifted", "yarn", "alibi"])
def test_a_training_step_in_bfloat16(name: str) -> None:
    model = build("llama")
    if name != "none":
        longctx.extend(model, settings(name))
    wanted, exact = gradients(model, "cpu", autocast=False)
    found, rounded = gradients(model, DEVICE, autocast=True)
    assert abs(found - wanted) < 0.02 * wanted
    assert nn.functional.cosine_similarity(rounded, exact, dim=0) > 0.98


@pytest.mark.filterwarnings("default")  # torch.compile has advice to give
@pytest.mark.parametrize("name", ["yarn", "dynamic", "alibi"])
def test_a_compiled_model_gives_the_same_logits(name: str) -> None:
    model, ids = build("llama").to(DEVICE), tokens(LONG).to(DEVICE)
    with longctx.extend(model, settings(name)), torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        found = torch.compile(model)(ids, use_cache=False).logits
    torch.compiler.reset()
    assert_near(found, wanted)


def test_generation_under_dynamic_is_that_of_repeated_whole_passes() -> None:
    model, ids = build("llama").to(DEVICE), tokens(WINDOW - 2).to(DEVICE)
    with longctx.extend(model, settings("dynamic")):
        generated = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0]
        with request(model, WINDOW + 6):
            picks = logits(model, generated[None, :-1])[0, WINDOW - 3 :]
    picks[:, 2] = -torch.inf  # min_new_tokens bars EOS
    assert generated[WINDOW - 2 :].tolist() == picks.argmax(-1).tolist()
