"""What is measured in training, against a forward written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

import longctx
from longctx.cli.training_metrics import figures_of
from longctx.eval.tasks.shared.texts import documents_of, spread
from longctx.prompts.haystacks import bos_of, held_out


def test_nll_by_position_and_perplexity_are_those_of_a_plain_forward() -> None:
    model: Any
    model, tokenizer = longctx.load("demo", device="cpu")
    longctx.extend(model, "linear", factor=4)
    found = figures_of(tokenizer, 256, 1024, tasks=("perplexity",), samples=1)(model)
    documents, bos = documents_of(tokenizer, held_out()), bos_of(tokenizer)
    size = 1024 - len(bos)
    places = spread({name: len(ids) for name, ids in documents.items()}, size, 4)
    nll: list[torch.Tensor] = []
    for name, start in places:
        ids = torch.tensor([[*bos, *documents[name][start : start + size]]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        nll.append(functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    mean = torch.stack(nll).mean(0)  # [1023], of the tokens at positions 1 to 1023
    for first, last in ((0, 256), (256, 512), (512, 1024)):
        wanted = mean[max(first - 1, 0) : last - 1].mean()
        assert found[f"nll@{first}-{last}"] == pytest.approx(wanted.item(), abs=1e-5)
    assert list(found) == [
        "perplexity@256",
        "perplexity@1024",
        "nll@0-256",
        "nll@256-512",
        "nll@512-1024",
    ]


def test_a_method_that_depends_on_the_length_has_no_nll_by_position() -> None:
    model, tokenizer = longctx.load("demo", device="cpu")
    longctx.extend(model, "dynamic", factor=2)
    figures = figures_of(tokenizer, 256, 512, tasks=("passkey", "perplexity"), samples=2)
    assert list(figures(model)) == [
        "passkey@256",
        "passkey@512",
        "perplexity@256",
        "perplexity@512",
    ]
