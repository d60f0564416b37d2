"""What a logits processor is told, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.generation.decoding import Call

from ...test_matrix import demo_tokenizer


def call(firsts: Sequence[int], starts: Sequence[int], tokenizer: Any = None) -> Call:
    nothing: Any = None
    return Call(
        nothing,
        tokenizer or demo_tokenizer(),
        torch.tensor(firsts),
        torch.tensor(starts),
        tuple(range(len(firsts))),
    )


def process(processor: Any, ids: Tensor, scores: Tensor) -> Tensor:
    """Typed as transformers' processors are called."""
    return processor(ids, scores)
