"""Sequence-level unlikelihood: greedy words, scored in one pass, and unlearnt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.errors import RunError
from longctx.train.continuation import SequenceUnlikelihood
from longctx.train.penalties import repeated

from ..families import build, tokens


@pytest.fixture
def model() -> Any:
    """It falls into loops, as small models do."""
    made = build("llama", initializer_range=0.1)
    made.generation_config.eos_token_id = None
    return made.train()


def greedy(model: Any, prefix: Tensor, count: int) -> Tensor:
    ids = prefix
    model.eval()
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    model.train()
    return ids


def test_it_is_the_formula_on_the_greedy_words(model: Any) -> None:
    prefix = tokens(10, batch=2, seed=5)
    wanted_ids = greedy(model, prefix, 40)
    logits = model(wanted_ids).logits.double()
    wanted, marked = torch.zeros((), dtype=torch.float64), 0
    for row in range(2):
        for place in repeated(wanted_ids[row, 10:], 3).nonzero().flatten().tolist():
            p = logits[row, 9 + place].softmax(-1)[wanted_ids[row, 10 + place]]
            wanted = wanted - (1 - p).log()
            marked += 1
    assert marked > 5
    settings = SequenceUnlikelihood(alpha=0.5, ngram=3, tokens=40)
    ids, real = settings.continued(model, prefix)
    assert torch.equal(ids, wanted_ids)
    assert real.all()
    loss = settings(model, prefix)
    assert model.training
    assert loss.item() == pytest.approx(0.5 * wanted.item() / 80, rel=1e-4)


def test_a_step_makes_the_repeated_words_less_likely(model: Any) -> None:
    prefix = tokens(10, seed=5)
    settings = SequenceUnlikelihood(tokens=32)
    ids, _ = settings.continued(model, prefix)
    again = repeated(ids[0, 10:], 4)
    assert again.sum() > 10

    def likelihood() -> float:
        with torch.no_grad():
            p = model(ids).logits[0, 9:-1].softmax(-1)
        return float(p.gather(1, ids[0, 10:, None])[again].mean())

    before = likelihood()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    settings(model, prefix).backward()
    optimizer.step()
    assert likelihood() < before


def test_words_after_an_end_token_do_not_count(model: Any) -> None:
    prefix = tokens(10, batch=2, seed=5)
    settings = SequenceUnlikelihood(ngram=1, tokens=20)
    plain, _ = settings.continued(model, prefix)
    end = int(plain[0, 14])
    model.generation_config.eos_token_id = [end]
    _, real = settings.continued(model, prefix)
    for row in range(2):
        words = plain[row, 10:].tolist()
        stop = words.index(end) + 1 if end in words else 20
        assert real[row, :stop].all()
        assert not real[row, stop:].any()
    assert real[0].sum() <= 5


def test_nothing_repeated_is_a_loss_of_zero(model: Any) -> None:
    loss = SequenceUnlikelihood(ngram=10, tokens=20)(model, tokens(10, seed=5))
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(RunError, match="2n tokens"):
        SequenceUnlikelihood(ngram=8, tokens=10)
