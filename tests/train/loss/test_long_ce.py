"""LongCE against its equations, a token at a time in float64, and within training."""

from __future__ import annotations

import math
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import longctx
from longctx.errors import RunError
from longctx.train import Epochs, Losses, Training, Unlikelihood, finetune
from longctx.train.data.collate import Collator, unpacked_inputs
from longctx.train.engine.loss_forward import LossForward
from longctx.train.engine.packed_attention import packed_attention
from longctx.train.loss.long_ce import LongCE
from longctx.train.parallel.compatibility import Setup, check_compatibility
from longctx.train.positions import PoSE
from longctx.train.recipes import Recipe

from ...families import build, tokens
from ...test_matrix import demo_tokenizer

LENGTHS = (23, 6, 41, 9)
SETTINGS = LongCE(short=8, step=3, gamma=1.5)
ONE = torch.tensor([1])
"""For a count: the sum itself."""


def batch_of(*which: int, positions: Any = None) -> dict[str, torch.Tensor]:
    """One row of packed documents, the first third of each not learnt."""
    documents = [tokens(LENGTHS[i], seed=i)[0].tolist() for i in which]
    labels = [[-100] * (len(d) // 3) + d[len(d) // 3 :] for d in documents]
    row = {
        "input_ids": list(chain(*documents)),
        "labels": list(chain(*labels)),
        "seq_lengths": [len(d) for d in documents],
    }
    collate = Collator() if positions is None else Collator(positions)
    return collate([row])


def naive(model: Any, batch: dict[str, torch.Tensor], settings: LongCE) -> torch.Tensor:
    """Σ w(x) (−log p(x)), every likelihood from whole logits of a text of its own."""

    def nats(ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(ids)[None]
        call = {"input_ids": ids[None], "position_ids": places[None], "attention_mask": mask}
        return -model(**call).logits[0, -2].log_softmax(-1)[ids[-1]]

    total = torch.zeros((), dtype=torch.float64)
    numbers = batch["document_ids"][0]
    for number in range(int(numbers.max()) + 1):
        own = numbers == number
        ids, labels, places = (batch[n][0, own] for n in ("input_ids", "labels", "position_ids"))
        for i in range(1, len(ids)):
            if labels[i] == -100:
                continue
            long, weight = nats(ids[: i + 1], places[: i + 1]), 1.0
            if i >= settings.short:
                first = (i - settings.short) // settings.stride * settings.stride
                with torch.no_grad():
                    short = nats(ids[first : i + 1], places[first : i + 1] - places[first])
                weight = min(math.exp(float(short - long.detach())), settings.gamma)
            total = total + weight * long
    return total


@pytest.mark.parametrize("family", ["llama", "cohere", "gemma3"])
def test_it_is_the_papers_sum_token_by_token(family: str) -> None:
    model: Any = build(family, initializer_range=0.3).double()
    batch = batch_of(2)
    wanted = naive(model, batch, SETTINGS)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss_forward = LossForward.on(model, Losses(long_ce=SETTINGS, chunk=5))
    extra = {"labels": batch["labels"], "document_ids": batch["document_ids"], "count": ONE}
    found = model(**unpacked_inputs(batch), **extra)
    found.backward()
    loss_forward.remove()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-10)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert error <= 1e-6, name  # transformers' norms compute in float32


@pytest.mark.parametrize("positions", [None, PoSE(41, 90)], ids=["full", "pose"])
def test_packed_documents_are_kept_apart(positions: Any) -> None:
    model: Any = build("llama", initializer_range=0.3).double()
    batch = batch_of(0, 1, 2, 3, positions=positions)
    wanted = naive(model, batch, SETTINGS).item()
    losses = Losses(long_ce=SETTINGS)
    extra = {"labels": batch["labels"], "document_ids": batch["document_ids"], "count": ONE}
    with packed_attention(model) as packed:
        loss_forward = LossForward.on(model, losses)
        found = model(**packed.inputs(batch), **extra).item()
        loss_forward.remove()
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("method", ["yarn:2+log_n", "dual_chunk:factor=2,log_n=True"])
def test_methods_that_look_at_positions_see_consecutive_ones(method: str) -> None:
    """Padding behind a window once stood before its beginning, and log_n made it NaN."""
    model: Any = build("llama", initializer_range=0.3, max_position_embeddings=16).double()
    longctx.extend(model, method)
    batch = batch_of(0, 1, 2, 3)
    wanted = naive(model, batch, SETTINGS).item()
    extra = {"labels": batch["labels"], "document_ids": batch["document_ids"], "count": ONE}
    with packed_attention(model) as packed:
        loss_forward = LossForward.on(model, Losses(long_ce=SETTINGS))
        found = model(**packed.inputs(batch), **extra).item()
        loss_forward.remove()
    assert found == pytest.approx(wanted, rel=1e-9)


def test_no_longer_context_is_plain_cross_entropy() -> None:
    model: Any = build("llama")
    batch = batch_of(1, 3)
    extra = {"labels": batch["labels"], "document_ids": batch["document_ids"], "count": ONE}
    found: list[float] = []
    with packed_attention(model) as packed:
        for losses in (Losses(), Losses(long_ce=LongCE(short=9))):
            loss_forward = LossForward.on(model, losses)
            found.append(model(**packed.inputs(batch), **extra).item())
            loss_forward.remove()
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_windows_end_with_their_document_and_score_what_is_learnt() -> None:
    batch = batch_of(0, 2)
    windows = list(SETTINGS._windows(batch["labels"], batch["document_ids"]))  # pyright: ignore[reportPrivateUsage]
    assert windows[:2] == [(0, 0, 11), (0, 3, 14)]
    assert {stop for *_, stop in windows} >= {23, 64}
    assert not any(start < 23 < stop for _, start, stop in windows)
    own = [(a, b) for _, a, b in windows if a >= 23]
    # Of the third document 13 tokens are not learnt: the first window scores one of them still.
    assert own[0] == (23 + 3, 23 + 3 + 11)
    assert all(b[0] - a[0] == 3 for a, b in pairwise(own))
    batch["labels"][:] = -100
    assert not list(SETTINGS._windows(batch["labels"], batch["document_ids"]))  # pyright: ignore[reportPrivateUsage]


def test_it_trains(tmp_path: Path) -> None:
    model = build("llama")
    rows = [{"input_ids": x, "labels": x, "length": 60} for x in tokens(60, 8).tolist()]
    dataset: Any = rows
    done = finetune(
        model, demo_tokenizer(), Epochs(dataset, rows=16),
        Training(max_steps=4, batch_size=4, learning_rate=3e-3, warmup=1),
        output_dir=tmp_path / "run", losses=Losses(long_ce=LongCE(short=16)), progress=False,
    )  # fmt: skip
    assert len(done.losses) == 4
    assert all(map(math.isfinite, done.losses))
    assert longctx.patch_of(model) is None


def test_what_does_not_go_together_is_named() -> None:
    with pytest.raises(RunError, match=r"short=0 \(--long-ce\)"):
        LongCE(short=0)
    with pytest.raises(RunError, match=r"gamma=0\.5 \(--long-ce-gamma\)"):
        LongCE(gamma=0.5)
    assert LongCE().stride == 1024
    assert LongCE(short=2).stride == 1
    with pytest.raises(RunError, match=r"leave one out \(--long-ce, --unlikelihood\)"):
        Losses(unlikelihood=Unlikelihood(), long_ce=LongCE())
    with pytest.raises(RunError, match="no weights for single tokens"):
        Losses(long_ce=LongCE(), kernel="liger")
    long_ce = Losses(long_ce=LongCE(short=512))
    with pytest.raises(RunError, match="512 tokens, in documents of up to 512"):
        Recipe(max_length=512, losses=long_ce)
    hidden, labels = torch.zeros(1, 4, 8), torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(RunError, match="long_ce needs what its short_context"):
        long_ce(hidden, torch.zeros(9, 8), labels)
    setup: dict[str, Any] = {"heads": 4, "kv_heads": 4, "whole_document_losses": ("long_ce",)}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"fully_sharded": True}, "long_ce and shared weights"),
        ({"sequence_parallel": 2}, r"sequence parallel \(2\) and the loss long_ce"),
        ({"context_parallel": 2}, r"context parallel \(2\) and the loss long_ce"),
    )
    for given, said in cases:
        with pytest.raises(RunError, match=said):
            check_compatibility(Setup(**setup, **given))
