"""Greedy generation as the model has it, whatever settings its checkpoint ships with."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

__all__ = ["greedy", "neutral"]


def greedy(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Tensor:
    """Return the tokens that follow prompts [B, S], each the argmax, on the CPU.

    Args:
        model: in place.
        prompts: token ids without padding.
        new_tokens: so many, past whatever token ends a text.
    """
    ids = prompts.to(model.device)
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=0,
    )
    with torch.no_grad(), neutral(model):
        out: Any = model.generate(  # pyright: ignore[reportCallIssue]
            ids,  # pyright: ignore[reportArgumentType]
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
        )
    return out[:, ids.shape[1] :].cpu()


@contextmanager
def neutral(model: PreTrainedModel) -> Generator[None]:
    """Put the checkpoint's generation settings aside.

    `generate` fills in from them whatever is unset, and None, which is how suppressed tokens or an
    end of text are switched off, counts as unset.
    """
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
