"""The tokens that end an answer: found in what is learnt, so that the served model stops at them.

    stop_at(model, ending_tokens(rows, tokenizer))

A base model that learns ChatML ends its answers with `<|im_end|>`, and its generation config knows
its own end token alone: it would go on after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["IGNORED", "control_tokens", "ending_tokens", "stop_at"]

IGNORED = -100
"""Label of a token that is not learnt."""


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens by number: one of them ends every answer."""
    added = tokenizer.added_tokens_decoder
    found = {number: str(token.content) for number, token in added.items() if token.special}
    if tokenizer.eos_token_id is not None:
        found[int(cast(int, tokenizer.eos_token_id))] = str(tokenizer.eos_token)
    return found


def ending_tokens(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The special tokens with which stretches of labels end.

    Args:
        rows: with `labels`, −100 where nothing is learnt; documents may be packed.
        tokenizer: what they were made with.
    """
    found: set[int] = set()
    for row in rows:
        labels = np.append(np.asarray(row["labels"], dtype=np.int64), IGNORED)
        found.update(labels[:-1][labels[1:] == IGNORED].tolist())
    return sorted(found & control_tokens(tokenizer).keys())


def stop_at(model: PreTrainedModel, tokens: Iterable[int]) -> None:
    """Add tokens to those at which the model's generation config stops; its own stay."""
    settings: Any = getattr(model, "generation_config", None)
    if settings is None:
        return
    own = settings.eos_token_id
    known = [] if own is None else own if isinstance(own, list) else [own]
    new = [token for token in tokens if token not in known]
    if new:
        settings.eos_token_id = [*known, *new]
