"""Unlikelihood and contrast against their formulas, written out in loops and float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longctx.train.loss.cross_entropy import Head
from longctx.train.loss.penalties import contrast, repeated, repetition, token_losses

LENGTH, SIZE, VOCABULARY = 30, 16, 12
HEADS = (Head(), Head(scale=0.5, softcap=4.0))


def draw() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and a document with many repeated tokens."""
    generator = torch.Generator().manual_seed(1)
    hidden = (0.4 * torch.randn(LENGTH, SIZE, generator=generator)).requires_grad_()
    weight = torch.randn(VOCABULARY, SIZE, generator=generator).requires_grad_()
    bias = torch.randn(VOCABULARY, generator=generator).requires_grad_()
    return hidden, weight, bias, torch.randint(VOCABULARY, (LENGTH,), generator=generator)


def probabilities(hidden: Tensor, weight: Tensor, bias: Tensor, head: Head) -> Tensor:
    logits = head.scale * (hidden.double() @ weight.double().T + bias.double())
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.softmax(-1)


def assert_same_gradients(found: Tensor, wanted: Tensor, *wrt: Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for one, other in zip(
        torch.autograd.grad(found, wrt, retain_graph=True),
        torch.autograd.grad(wanted, wrt, retain_graph=True),
        strict=True,
    ):
        assert (one - other).norm() <= 2e-6 * other.norm()


@pytest.mark.parametrize("chunk", [4, 256])
@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_token_level_unlikelihood(head: Head, chunk: int) -> None:
    hidden, weight, bias, document = draw()
    places = torch.tensor([1, 2, 5, 11, 12, 13, 20, 29])  # supervised: not the whole document
    nats, unlikely = token_losses(
        *(hidden[places - 1], weight, bias, head, document[places], places, document), chunk
    )
    p = probabilities(hidden, weight, bias, head)
    wanted_nats, wanted = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t in places.tolist():
        target = int(document[t])
        wanted_nats = wanted_nats - p[t - 1, target].log()
        for candidate in set(document[:t].tolist()) - {target}:
            wanted = wanted - (1 - p[t - 1, candidate]).log()
    assert_same_gradients(nats, wanted_nats, hidden, weight, bias)
    assert_same_gradients(unlikely, wanted, hidden, weight, bias)


def in_words(tokens: list[int], n: int) -> list[bool]:
    """The paper's definition: some n-gram around x_t is found before where it starts."""
    marked: list[bool] = []
    for t in range(len(tokens)):
        starts = [s for s in range(t - n + 1, t + 1) if s >= 0 and s + n <= len(tokens)]
        marked.append(
            any(tokens[s : s + n] == tokens[e : e + n] for s in starts for e in range(s - n + 1))
        )
    return marked


@pytest.mark.parametrize("n", [1, 2, 4])
def test_repeated_ngrams(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    seen = set[bool]()
    for vocabulary in (1, 2, 3, 50):
        for length in (0, 1, 3, 8, 25, 40):
            tokens = torch.randint(vocabulary, (length,), generator=generator)
            found = repeated(tokens, n).tolist()
            assert found == in_words(tokens.tolist(), n)
            seen |= set(found)
    assert seen == {True, False}


@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_unlikelihood_of_repetitions(head: Head, chunk: int) -> None:
    hidden, weight, bias, document = draw()
    found = repetition(hidden, weight, bias, head, document, chunk)
    p = probabilities(hidden, weight, bias, head)
    wanted = -(1 - p[torch.arange(LENGTH), document]).log().sum()
    assert_same_gradients(found, wanted, hidden, weight, bias)


def test_a_certain_token_has_a_finite_penalty() -> None:
    hidden, weight = torch.full((1, 1), 60.0, requires_grad=True), torch.tensor([[1.0], [-1.0]])
    for loss in (
        repetition(hidden, weight, None, Head(), torch.tensor([0])),
        token_losses(
            *(hidden, weight, None, Head()),
            torch.tensor([1]),
            torch.tensor([1]),
            torch.tensor([0, 1]),
        )[1],
    ):
        assert loss.item() == pytest.approx(11.5129, abs=1e-3)  # −log 1e-5
        assert torch.autograd.grad(loss, hidden, retain_graph=True)[0].isfinite().all()


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("margin", [0.5, 0.8, 1.0])
def test_contrast(margin: float, chunk: int) -> None:
    hidden, *_ = draw()
    found = contrast(hidden, margin, chunk)
    wanted = torch.zeros((), dtype=torch.float64)
    for i in range(LENGTH):
        for j in range(LENGTH):
            if i != j:
                similar = functional.cosine_similarity(
                    hidden[i].double(), hidden[j].double(), dim=0
                )
                wanted = wanted + (margin - 1 + similar).clamp(min=0)
    wanted = wanted / (LENGTH * (LENGTH - 1))
    assert wanted.item() > 0
    assert_same_gradients(found, wanted, hidden)


def test_contrast_is_float32_of_bfloat16_states_also_under_autocast() -> None:
    hidden, *_ = draw()
    half = hidden.detach().bfloat16().requires_grad_()
    wanted = contrast(half.detach().double(), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrast(half, 0.5)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.autograd.grad(found, half)[0].dtype == torch.bfloat16
