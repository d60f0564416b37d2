"""The loss inside the model's forward: transformers' own loss, and means of means over kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

import longctx
from longctx.train.data.tokenize import IGNORED
from longctx.train.engine.loss_forward import LossForward
from longctx.train.loss.objective import Losses


@pytest.fixture
def model() -> PreTrainedModel:
    loaded, _ = longctx.load("demo", device="cpu")
    longctx.extend(loaded, "yarn", factor=4)
    return loaded


def ids_of(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 1000, shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_loss_of_transformers(model: Any) -> None:
    ids = ids_of((2, 50))
    labels = ids.clone()
    labels[0, :30] = IGNORED
    count = (labels[:, 1:] != IGNORED).sum()
    wanted = model(input_ids=ids, labels=labels, num_items_in_batch=count).loss
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.enable_grad():
        loss_forward = LossForward.on(model, Losses())
        loss = model(input_ids=ids, use_cache=False, labels=labels, count=count[None].float())
        loss.backward()
    loss_forward.remove()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_each_kind_is_averaged_apart(model: Any) -> None:
    ids = ids_of((2, 40))
    kinds = torch.zeros_like(ids)
    kinds[1] = 1
    labels = ids.clone()
    labels[1, :36] = IGNORED
    logits = model(input_ids=ids).logits[:, :-1]
    means = [
        functional.cross_entropy(logits[n], labels[n, 1:], ignore_index=IGNORED) for n in (0, 1)
    ]
    loss_forward = LossForward.on(model, Losses(), shares=(0.75, 0.25))
    call = {"input_ids": ids, "use_cache": False, "labels": labels, "kind_ids": kinds}
    both = model(**call, count=torch.tensor([39.0, 4.0]))
    assert both.item() == pytest.approx(0.75 * means[0].item() + 0.25 * means[1].item(), abs=1e-5)
    # A kind that no process has in this update leaves its share to the other.
    labels[1] = IGNORED
    alone = model(**call, count=torch.tensor([39.0, 0.0]))
    assert alone.item() == pytest.approx(means[0].item(), abs=1e-5)
    loss_forward.remove()


def test_without_a_count_the_model_is_itself(model: Any) -> None:
    ids = ids_of((1, 30))
    before = model(input_ids=ids).logits
    loss_forward = LossForward.on(model, Losses())
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 33)
    assert longctx.extend  # the patch below is untouched
    loss_forward.remove()
    assert "forward" not in model.__dict__
    assert torch.equal(model(input_ids=ids).logits, before)
