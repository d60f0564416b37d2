"""Attention of a few queries with a mask over a long cache, without a copy of keys for each head.

transformers' SDPA repeats keys and values for grouped heads as soon as there is a mask, which costs
more than the attention itself where queries are few. Here the heads of a group become queries:

    q [B, K·g, S, D] → [B, K, g·S, D],   mask [B, 1, S, N] → [B, 1, g·S, N]

Legend: B batch, K key/value heads, g query heads of each, S queries, N keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

__all__ = ["grouped_queries"]

_NAME = "longctx_packed"
_OTHERS = ("softcap", "s_aux", "position_bias", "cache")


@contextmanager
def grouped_queries(model: PreTrainedModel) -> Generator[None]:
    """Have a model under "sdpa" attend so inside the block; others attend as they do."""
    config: Any = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(_NAME, _forward)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Output [B, S, H, D]; the signature is transformers'."""
    heads = key.shape[1]
    special = any(settings.get(name) is not None for name in _OTHERS)
    if special or attention_mask is None or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **settings
        )
    group = query.shape[1] // heads
    out = scaled_dot_product_attention(
        rearrange(query, "b (k g) s d -> b k (g s) d", k=heads),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, group, 1),
        scale=scaling,
    )
    return rearrange(out, "b k (g s) d -> b s (k g) d", g=group).contiguous(), None
