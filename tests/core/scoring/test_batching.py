"""Halving where memory runs out, and only there."""

from __future__ import annotations

import pytest
import torch

from longctx.scoring.batching import is_out_of_memory, score_batches, shrinking
from longctx.scoring.token_scores import score

from ...eval.conftest import byte_model


def test_the_batch_is_halved_until_it_fits_and_nothing_is_lost() -> None:
    tried: list[tuple[int, int]] = []

    def run(first: int, last: int) -> list[int]:
        tried.append((first, last))
        if last - first > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return list(range(first, last))

    assert [i for part in shrinking(10, 8, run) for i in part] == list(range(10))
    assert tried[:3] == [(0, 8), (0, 4), (0, 2)]
    assert len(tried) == 2 + 5, "it stays halved"


def test_a_single_prompt_that_does_not_fit_ends_it() -> None:
    def run(first: int, last: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate …")

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        shrinking(4, 4, run)


def test_other_errors_are_not_retried() -> None:
    calls = []

    def run(first: int, last: int) -> None:
        calls.append(first)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        shrinking(4, 4, run)
    assert calls == [0]
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory"))


def test_batches_give_what_one_by_one_gives() -> None:
    model = byte_model()
    ids = torch.randint(3, 259, (5, 40), generator=torch.Generator().manual_seed(0))
    found = score_batches(model, ids, start=30, batch_tokens=80)
    whole = score(model, ids, start=30)
    torch.testing.assert_close(found.nll, whole.nll)
    assert torch.equal(found.argmax, whole.argmax)
    assert torch.equal(found.targets, ids[:, 30:])
