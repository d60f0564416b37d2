"""Grouped heads as queries: the same attention, in models that have it, and no trace after."""

from __future__ import annotations

import pytest
import torch

from longctx.attention.packed import grouped_queries

from ...families import build


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "olmo2", "cohere", "glm"])
def test_it_is_sdpa_with_a_mask(family: str) -> None:
    model = build(family).double().eval()
    assert model.config._attn_implementation == "sdpa"
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    seen = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(1)) < 0.6
    seen |= torch.eye(12, dtype=torch.bool)
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300)
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        with grouped_queries(model):
            found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found, wanted)
    assert model.config._attn_implementation == "sdpa"


def test_other_kernels_are_left_alone() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    with grouped_queries(model):
        assert model.config._attn_implementation == "eager"
    with pytest.raises(KeyError), grouped_queries(build("llama")):
        raise KeyError
