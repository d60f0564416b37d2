"""Sequence-level unlikelihood: greedy words, scored in one pass, and unlearnt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.errors import RunError
from longctx.train.data.tokenize import IGNORED
from longctx.train.loss.penalties import repeated
from longctx.train.loss.sequence_unlikelihood import SequenceUnlikelihood

from ...families import build, tokens


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


def test_prefixes_end_where_something_is_learnt_and_stay_in_their_document() -> None:
    ids = torch.arange(2 * 30).reshape(2, 30)
    numbers = torch.tensor([[0] * 20 + [1] * 10, [0] * 25 + [-1] * 5])
    labels = torch.where(numbers < 0, IGNORED, ids)
    labels[0, :12] = IGNORED  # learnt: 12 … 19 of the first document, 21 … 29 of the second
    batch = {"input_ids": ids, "labels": labels, "document_ids": numbers}
    ends = set[tuple[int, ...]]()
    for step in range(60):
        found = SequenceUnlikelihood(prefix=8).prefixes(batch, step)
        assert found.shape == (3, 8)
        assert torch.equal(found.diff(), torch.ones(3, 7, dtype=torch.int64))
        first, second, third = (found[:, -1] + 1).tolist()
        assert 12 <= first <= 19
        assert 28 <= second <= 29
        assert 38 <= third <= 54
        ends.add((first, second, third))
    assert len(ends) > 20
    one, other = (SequenceUnlikelihood(prefix=8).prefixes(batch, 59) for _ in range(2))
    assert torch.equal(one, other)
    # 24 tokens before a learnt one: only the longest document has as many
    assert SequenceUnlikelihood(prefix=24).prefixes(batch, 0).tolist() == [list(range(30, 54))]
    assert SequenceUnlikelihood(prefix=99).prefixes(batch, 0).shape == (1, 24)
    labels.fill_(IGNORED)
    assert len(SequenceUnlikelihood().prefixes(batch, 0)) == 0


def test_its_turn_comes_as_often_as_its_share_says() -> None:
    turns = [SequenceUnlikelihood(share=0.3).has_turn(step) for step in range(2_000)]
    assert sum(turns) / 2_000 == pytest.approx(0.3, abs=0.03)
    assert all(SequenceUnlikelihood(share=1.0).has_turn(step) for step in range(50))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(RunError, match="a share above 0"):
        SequenceUnlikelihood(share=0.0)
    with pytest.raises(RunError, match="2n tokens"):
        SequenceUnlikelihood(ngram=8, tokens=10)
