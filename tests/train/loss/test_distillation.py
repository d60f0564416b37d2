"""Learning from a teacher's logits: against the plain formula, in chunks, and end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import longctx
from longctx.errors import RunError
from longctx.patches.multi_query import MultiQuery
from longctx.train import Distillation, Epochs, Losses, Training, finetune
from longctx.train.engine.loss_forward import LossForward
from longctx.train.engine.teaching import frozen
from longctx.train.loss.cross_entropy import Head
from longctx.train.loss.distillation import Teacher, divergence

from ...families import build, tokens
from ...test_matrix import demo_tokenizer


@pytest.mark.parametrize("head", [Head(), Head(scale=0.5, softcap=4.0)], ids=repr)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_the_divergence_of_whole_logits(head: Head, temperature: float) -> None:
    teacher = Teacher.of(build("cohere"))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, 20, generator=generator).requires_grad_()
    weight = torch.randn(96, 20, generator=generator).requires_grad_()
    theirs = torch.randn(50, 64, generator=generator)
    found = divergence(
        *(states, weight, None, head, teacher, theirs), temperature=temperature, chunk=7
    )
    mine = head.logits(states, weight, None).double() / temperature
    other: Any = teacher.head.logits(theirs, teacher.model.lm_head.weight, None).double()
    p, q = mine.softmax(-1), (other / temperature).softmax(-1)
    wanted = temperature**2 * (q * (q / p).log()).sum()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    grads = torch.autograd.grad(found, (states, weight))
    for one, two in zip(grads, torch.autograd.grad(wanted, (states, weight)), strict=True):
        assert (one - two).norm() <= 1e-5 * two.norm()


def test_the_original_itself_teaches_nothing_more() -> None:
    model, teacher = build("llama"), build("llama")
    ids, count = tokens(40, batch=2), torch.tensor([2 * 39])
    losses = Losses(distillation=Distillation(alpha=0.25))
    loss_forward = LossForward.on(model, losses, teacher=teacher)
    found: Any = model(input_ids=ids, labels=ids, count=count)
    loss_forward.remove()
    logits: Any = model(input_ids=ids).logits[:, :-1]
    wanted = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert found.item() == pytest.approx(0.75 * wanted.item(), rel=1e-5)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_a_converted_model_comes_nearer_to_its_original(tmp_path: Path) -> None:
    original = build("llama")
    before = {name: weight.clone() for name, weight in original.state_dict().items()}
    model = longctx.convert(original, MultiQuery(1), calibration=tokens(60, batch=4)).model
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = [{"input_ids": x, "labels": x, "length": 60} for x in tokens(60, 40).tolist()]
    dataset: Any = rows
    done = finetune(
        model,
        demo_tokenizer(),
        Epochs(dataset, rows=120),
        Training(max_steps=30, batch_size=4, learning_rate=3e-3, warmup=2),
        output_dir=tmp_path / "run",
        losses=Losses(distillation=Distillation(alpha=1.0)),
        teacher=original,
        weights="attention",
        packed=False,
        progress=False,
    )
    assert done.losses[-1] < 0.9 * done.losses[0]
    assert all(torch.equal(before[name], w) for name, w in original.state_dict().items())
    for name, weight in done.model.state_dict().items():
        assert torch.equal(start[name], weight) == ("self_attn" not in name), name
    assert all(p.requires_grad for p in done.model.parameters())


def test_a_teacher_fills_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(*_: object) -> None:
        raise AssertionError

    teacher = Teacher.of(build("llama"))
    monkeypatch.setattr("transformers.DynamicCache.update", filled)
    assert teacher.hidden(input_ids=tokens(8)).shape == (1, 8, 64)


def test_what_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    rows: Any = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "length": 3}]
    given: Any = (model, demo_tokenizer(), Epochs(rows, rows=1), Training(max_steps=1))
    where: dict[str, Any] = {"output_dir": tmp_path / "run"}
    taught: dict[str, Any] = {"losses": Losses(distillation=Distillation()), **where}
    with pytest.raises(RunError, match="distillation needs a teacher"):
        finetune(*given, **taught)
    with pytest.raises(RunError, match="a teacher is for distillation"):
        finetune(*given, teacher=build("llama"), **where)
    with pytest.raises(RunError, match="the teacher is the model itself"):
        finetune(*given, teacher=model, **taught)
    with pytest.raises(RunError, match="the teacher has 50 tokens and the model 96"):
        finetune(*given, teacher=build("llama", vocab_size=50), **taught)
    with pytest.raises(RunError, match="weights='some'"), frozen(model, "some"):  # pyright: ignore[reportArgumentType]
        pass
    for wrong in (0, 1.5):
        with pytest.raises(RunError, match="alpha="):
            Distillation(alpha=wrong)
    with pytest.raises(RunError, match="temperature=0"):
        Distillation(temperature=0)
    assert replace(Distillation(), alpha=1.0).alpha == 1.0
