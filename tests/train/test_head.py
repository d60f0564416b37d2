"""Chunked cross-entropy against the formula in float64, and the heads of models with extras."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from longctx.errors import ModelError, RunError
from longctx.train import before_torch_2_13
from longctx.train.head import Head, cross_entropy, head_of, projection

from ..families import build

ROWS, SIZE, VOCABULARY = 50, 24, 97
HEADS = (Head(), Head(scale=0.25), Head(softcap=3.0), Head(scale=2.0, softcap=5.0))


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and targets."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, SIZE), (VOCABULARY, SIZE), (VOCABULARY,))
    made = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    return (*made, torch.randint(VOCABULARY, (ROWS,), generator=generator))  # pyright: ignore[reportReturnType]


def naive(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, head: Head) -> Tensor:
    logits = head.scale * (hidden.double() @ weight.double().T + bias.double())
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return -p[torch.arange(len(p)), targets].log().sum()


@pytest.mark.parametrize("chunk", [7, 50, 1024])
@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_value_and_gradients_are_those_of_the_formula(head: Head, chunk: int) -> None:
    hidden, weight, bias, targets = draw()
    found = cross_entropy(hidden, weight, targets, bias=bias, head=head, chunk=chunk)
    wanted = naive(hidden, weight, bias, targets, head)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    wrt = (hidden, weight, bias)
    for one, other in zip(
        torch.autograd.grad(found / ROWS, wrt), torch.autograd.grad(wanted / ROWS, wrt), strict=True
    ):
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_for_older_torch_is_that_of_the_formula(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = draw(dtype)
    found = before_torch_2_13.linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=7)
    wanted = naive(hidden, weight, bias, targets, Head())
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    assert found.item() == pytest.approx(wanted.item(), rel=tolerance)
    wrt = (hidden, weight, bias)
    for one, other in zip(
        torch.autograd.grad(found / ROWS, wrt), torch.autograd.grad(wanted / ROWS, wrt), strict=True
    ):
        assert one.dtype == dtype
        assert (one - other).double().norm() <= 4 * tolerance * other.double().norm()
    frozen = before_torch_2_13.linear_cross_entropy(
        hidden, weight.detach(), targets, bias=None, chunk=7
    )
    unbiased = naive(hidden, weight, torch.zeros_like(bias), targets, Head())
    (one,), (other,) = (torch.autograd.grad(loss / ROWS, hidden) for loss in (frozen, unbiased))
    assert (one - other).double().norm() <= 4 * tolerance * other.double().norm()


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_bfloat16_is_within_rounding_of_float32(head: Head) -> None:
    hidden, weight, bias, targets = draw(torch.bfloat16)
    found = cross_entropy(hidden, weight, targets, bias=bias, head=head, chunk=7) / ROWS
    wanted = naive(hidden, weight, bias, targets, head) / ROWS
    assert found.dtype == torch.float32
    # A bfloat16 holds 8 bits: logits of up to 16 are off by 2⁻⁵ each, at random.
    assert abs(found.item() - wanted.item()) < 0.02
    (gradient,) = torch.autograd.grad(found, weight)
    (exact,) = torch.autograd.grad(wanted, weight)
    assert (gradient.float() - exact.float()).norm() < 0.02 * exact.float().norm()


def test_no_rows_cost_nothing_and_have_gradients_of_zero() -> None:
    hidden, weight, _, _ = draw()
    loss = cross_entropy(hidden[:0], weight, torch.empty(0, dtype=torch.long))
    assert loss.item() == 0.0
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert not any(g.any() for g in gradients)


def test_autocast_decides_the_precision() -> None:
    hidden, weight, bias, targets = draw()
    plain = naive(hidden, weight, bias, targets, Head()).item()
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_entropy(hidden, weight, targets, bias=bias).item()
    assert found == pytest.approx(plain, rel=1e-2)
    assert found != pytest.approx(plain, rel=1e-6)


TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (lambda: build("llama"), Head()),
        (lambda: build("gemma3"), Head()),
        (lambda: CohereForCausalLM(CohereConfig(**TINY)), Head(scale=0.0625)),
        (lambda: GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=4.0)), Head(scale=0.25)),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**TINY)), Head(softcap=30.0)),
    ],
)
def test_heads_are_read_from_the_model(model: Any, wanted: Head) -> None:
    made = model().train()
    assert head_of(made) == wanted
    assert made.training


def test_a_head_that_does_more_is_refused() -> None:
    model = build("llama")
    model.register_forward_hook(lambda *a: type(a[2])(**{**a[2], "logits": a[2].logits + 1}))
    with pytest.raises(ModelError, match="does something to them"):
        head_of(model)


def test_adapters_on_the_head_are_refused_and_whole_heads_found() -> None:
    model = build("llama")
    assert projection(model) is model.lm_head
    model.set_output_embeddings(nn.Sequential(model.lm_head))
    with pytest.raises(ModelError, match="leave adapters off"):
        projection(model)


def test_liger_is_asked_for_only_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = draw()
    with pytest.raises(RunError, match="kernel='cuda'"):
        cross_entropy(hidden, weight, targets, kernel="cuda")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RunError, match=r"not installed: `pip install liger-kernel`"):
        cross_entropy(hidden, weight, targets, kernel="liger")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "liger_kernel")  # pyright: ignore[reportUnknownLambdaType]
    with pytest.raises(RunError, match="runs on CUDA"):
        cross_entropy(hidden, weight, targets, kernel="liger")
    wanted = naive(hidden, weight, bias, targets, Head()).item()
    assert cross_entropy(hidden, weight, targets, bias=bias).item() == pytest.approx(wanted)


def test_liger_is_called_as_it_asks_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, as of 0.8: a sum in float32, scale folded in, soft cap handed on."""

    def stand_in(input: Tensor, weight: Tensor, target: Tensor, **rest: Any) -> Tensor:  # noqa: A002
        assert rest.pop("reduction") == "sum"
        assert rest.pop("accum_dtype") == torch.float32
        cap, bias = rest.pop("softcap"), rest.pop("bias")
        assert not rest
        logits = functional.linear(input, weight, bias)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return functional.cross_entropy(logits, target, reduction="sum")

    module: Any = ModuleType("liger_kernel.transformers.functional")
    module.liger_fused_linear_cross_entropy = stand_in
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        "longctx.train.head._liger", lambda kernel, hidden: module.liger_fused_linear_cross_entropy
    )
    hidden, weight, bias, targets = draw()
    for head in HEADS:
        found = cross_entropy(hidden, weight, targets, bias=bias, head=head).item()
        assert found == pytest.approx(naive(hidden, weight, bias, targets, head).item(), rel=1e-5)
