"""The loss hook: against plain formulas, packed against alone, in parts against the whole."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longctx.errors import RunError
from longctx.train.data.collate import Collator, unpacked_inputs
from longctx.train.engine.packed_attention import packed_attention
from longctx.train.loss.cross_entropy import Head, head_of, projection
from longctx.train.loss.objective import Contrastive, Losses, Unlikelihood
from longctx.train.loss.penalties import contrast

from ...families import build, tokens

EVERYTHING = Losses(Unlikelihood(alpha=0.7), Contrastive(margin=0.9), chunk=16)
LENGTHS = (23, 2, 30, 14)


def rows(*which: int) -> list[dict[str, Any]]:
    """One packed row; the first half of each document is not learnt."""
    documents = [tokens(LENGTHS[i], seed=i)[0].tolist() for i in which]
    labels = [[-100] * (len(d) // 2) + d[len(d) // 2 :] for d in documents]
    return [
        {
            "input_ids": list(chain(*documents)),
            "labels": list(chain(*labels)),
            "seq_lengths": [len(d) for d in documents],
        }
    ]


def batch_of(*packed: tuple[int, ...]) -> dict[str, Tensor]:
    return Collator()([row for which in packed for row in rows(*which)])


def states(batch: dict[str, Tensor], size: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*batch["input_ids"].shape, size, generator=generator).requires_grad_()


def head_weight(size: int = 20) -> Tensor:
    return torch.randn(96, size, generator=torch.Generator().manual_seed(6)).requires_grad_()


def extras(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", "document_ids")}


@pytest.mark.parametrize("head", [Head(), Head(scale=0.5, softcap=4.0)], ids=repr)
def test_ignored_rows_change_nothing(head: Head) -> None:
    batch = batch_of((0, 1), (2,))
    hidden, weight = states(batch), head_weight()
    loss = Losses(chunk=7)(hidden, weight, batch["labels"], head=head)
    logits = head.scale * (hidden.double() @ weight.double().T)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    wanted = functional.cross_entropy(
        logits[:, :-1].reshape(-1, 96), batch["labels"][:, 1:].reshape(-1), ignore_index=-100
    )
    assert loss.tokens == int((batch["labels"] != -100).sum()) == 12 + 1 + 15
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert loss.cross_entropy.item() == loss.total.item()
    assert loss.unlikelihood is loss.contrastive is None
    assert not loss.cross_entropy.requires_grad
    found = torch.autograd.grad(loss.total, (hidden, weight))
    for one, other in zip(found, torch.autograd.grad(wanted, (hidden, weight)), strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
    predicts = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    assert torch.equal(found[0].abs().sum(-1) > 0, predicts)


def test_shifted_labels_are_taken_as_they_stand() -> None:
    batch = batch_of((0,), (2,))
    hidden, weight = states(batch), head_weight()
    labels = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    labels_aligned = Losses()(hidden, weight, labels, labels_aligned=True)
    assert labels_aligned.total.item() == Losses()(hidden, weight, batch["labels"]).total.item()


@pytest.mark.parametrize("count", [100.0, torch.tensor(100)])
def test_the_global_count_divides_every_part(count: float | Tensor) -> None:
    batch = batch_of((0, 1), (2, 3))
    hidden, weight = states(batch), head_weight()
    own = EVERYTHING(hidden, weight, batch["labels"], **extras(batch))
    loss = EVERYTHING(hidden, weight, batch["labels"], count=count, **extras(batch))
    for name in ("total", "cross_entropy", "unlikelihood", "contrastive"):
        one, other = getattr(loss, name), getattr(own, name)
        assert one.item() * 100 == pytest.approx(other.item() * own.tokens, rel=1e-5)
    assert own.unlikelihood is not None
    assert own.contrastive is not None
    parts = own.cross_entropy + 0.7 * own.unlikelihood + own.contrastive
    assert own.total.item() == pytest.approx(parts.item(), rel=1e-6)


def test_micro_batches_add_up_to_the_whole() -> None:
    batch = batch_of((0, 1), (2, 3))
    hidden, weight = states(batch), head_weight()
    whole = EVERYTHING(hidden, weight, batch["labels"], **extras(batch))
    wanted = torch.autograd.grad(whole.total, (hidden, weight))
    total = torch.zeros(())
    for i in range(2):
        part = {name: value[i : i + 1] for name, value in batch.items()}
        loss = EVERYTHING(
            hidden[i : i + 1], weight, part["labels"], count=whole.tokens, **extras(part)
        )
        total = total + loss.total
    assert total.item() == pytest.approx(whole.total.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(total, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_penalties_are_those_of_each_document() -> None:
    batch = batch_of((0, 1, 3))
    hidden, weight = states(batch), head_weight()
    loss = EVERYTHING(hidden, weight, batch["labels"], **extras(batch))
    p = (hidden[0].double() @ weight.double().T).softmax(-1)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    unlikely = apart = 0.0
    borders = [0, 23, 25, 39]
    for first, last in pairwise(borders):
        for t in range(first + 1, last):
            if labels[t] != -100:
                said = set(ids[first:t]) - {ids[t]}
                unlikely -= sum((1 - p[t - 1, c]).log().item() for c in said)
        learnt = sum(label != -100 for label in labels[first:last])
        apart += learnt * contrast(hidden[0, first:last], 0.9).item()
    assert loss.unlikelihood is not None
    assert loss.contrastive is not None
    assert loss.unlikelihood.item() == pytest.approx(unlikely / loss.tokens, rel=1e-5)
    assert loss.contrastive.item() == pytest.approx(apart / loss.tokens, rel=1e-5)


@pytest.mark.parametrize("losses", [Losses(chunk=16), EVERYTHING], ids=["plain", "everything"])
def test_packed_equals_alone_through_a_model(losses: Losses) -> None:
    model: Any = build("llama", initializer_range=0.1)
    head, linear = head_of(model), projection(model)
    packed_batch, alone = batch_of((0, 1), (2, 3)), [batch_of((i,)) for i in range(4)]
    count = int((packed_batch["labels"] != -100).sum())
    total = 0.0
    for batch in alone:
        hidden = model.base_model(**unpacked_inputs(batch)).last_hidden_state
        loss = losses(
            *(hidden, linear.weight, batch["labels"]), head=head, count=count, **extras(batch)
        )
        loss.total.backward()
        total += loss.total.item()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with packed_attention(model) as packed:
        hidden = model.base_model(**packed.inputs(packed_batch)).last_hidden_state
    loss = losses(
        *(hidden, linear.weight, packed_batch["labels"]), head=head, **extras(packed_batch)
    )
    loss.total.backward()
    assert loss.tokens == count
    assert loss.total.item() == pytest.approx(total, rel=1e-6)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
        assert error <= 1e-6, (name, error)


def test_nothing_supervised_is_a_loss_of_zero_with_gradients() -> None:
    batch = batch_of((0, 1))
    batch["labels"][:] = -100
    hidden, weight = states(batch), head_weight()
    for losses in (Losses(), EVERYTHING):
        loss = losses(hidden, weight, batch["labels"], **extras(batch))
        assert loss.total.item() == loss.tokens == 0
        assert not any(g.any() for g in torch.autograd.grad(loss.total, (hidden, weight)))


def test_the_labels_of_half_precision_states_cost_no_precision() -> None:
    batch = batch_of((0, 1), (2, 3))
    hidden, weight = (x.detach().bfloat16() for x in (states(batch), head_weight()))
    for losses in (Losses(), EVERYTHING):
        half = losses(hidden, weight, batch["labels"], **extras(batch))
        full = losses(hidden.float(), weight.float(), batch["labels"], **extras(batch))
        assert half.total.dtype == torch.float32
        assert half.total.item() == pytest.approx(full.total.item(), rel=5e-3)


def test_what_is_missing_is_said() -> None:
    batch = batch_of((0, 1))
    hidden, weight = states(batch), head_weight()
    with pytest.raises(RunError, match=r"hidden states \[1, 5, 20\] and labels \[1, 25\]"):
        Losses()(hidden[:, :5], weight, batch["labels"])
    with pytest.raises(RunError, match="unlikelihood and contrastive needs whole documents"):
        EVERYTHING(hidden, weight, batch["labels"], input_ids=batch["input_ids"])
    with pytest.raises(RunError, match="pass input_ids"):
        EVERYTHING(hidden, weight, batch["labels"], document_ids=batch["document_ids"])
    with pytest.raises(RunError, match="whole documents"):
        EVERYTHING(hidden, weight, batch["labels"], labels_aligned=True, **extras(batch))
    with pytest.raises(RunError, match="alpha=0"):
        Unlikelihood(alpha=0)
    with pytest.raises(RunError, match="margin=2"):
        Contrastive(margin=2)
