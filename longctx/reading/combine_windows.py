"""windows: pieces are read side by side, at the same positions, and the question sees all of them.

Every piece is read by itself from position 0 on; the question and the answer go on after the
longest, and attend to the keys of all pieces. No position is beyond the window, and yet the model
attends to more keys than it was trained with: the more pieces, the worse.

Source: Ratner et al. 2023, Parallel Context Windows (arXiv:2212.10947), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..before_transformers_5_24 import cache_argument
from ..errors import ModelError
from ..model import evaluating
from ..patch import methods_of
from .pieces import Piece
from .question import Question

__all__ = ["read_side_by_side", "refuse_windows"]


def refuse_windows(model: PreTrainedModel) -> None:
    """Refuse methods under which keys of several pieces cannot be put into one cache.

    Raises:
        ModelError: one that changes distances, or whose frequencies depend on the length.
    """
    for method in methods_of(model):
        if set(method.slots) != {"rotary"} or not method.length_invariant:
            raise ModelError(
                f"combine='windows' puts pieces side by side at the same positions, which "
                f"{method.name} does not allow: it changes more than fixed frequencies. Use "
                "combine='map', or remove the method."
            )


def read_side_by_side(
    model: PreTrainedModel,
    question: Question,
    pieces: Sequence[Piece],
    *,
    max_new_tokens: int,
    ends: Collection[int],
    advance: Callable[[int], object],
) -> tuple[int, ...]:
    """The tokens of one answer, greedily.

    Args:
        model: in place.
        question: what is asked.
        pieces: of the document.
        max_new_tokens: at most.
        ends: tokens that end the answer, and are not of it.
        advance: called with the number of pieces that are done.

    Raises:
        ModelError: a family that keeps something else than all keys.
    """
    argument = cache_argument(model.base_model.forward)
    if argument is None:
        raise ModelError(_refused(model, "takes no cache of keys"))
    said: list[int] = []
    with torch.no_grad(), evaluating(model):
        caches: list[DynamicCache] = []
        for piece in pieces:
            ids = (*question.before, *piece.ids)
            output = _forward(model, ids, range(len(ids)), len(ids), {})
            caches.append(_all_keys(model, output[argument]))
            advance(1)
        cache = _joined(caches)
        position = max(int(each.get_seq_length()) for each in caches)
        ids: tuple[int, ...] = question.after
        while len(said) < max_new_tokens:
            seen = int(cache.get_seq_length()) + len(ids)
            places = range(position, position + len(ids))
            output = _forward(model, ids, places, seen, {argument: cache})
            token = int(output.logits[0, -1].argmax())
            if token in ends:
                break
            said.append(token)
            position, ids = position + len(ids), (token,)
    return tuple(said)


def _forward(
    model: PreTrainedModel, ids: Sequence[int], positions: range, seen: int, more: dict[str, Any]
) -> Any:
    """Read tokens at these positions; the mask says that all tokens seen are one text."""
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    return model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention_mask=torch.ones(1, seen, dtype=torch.long, device=device),
        use_cache=True,
        **more,
    )


def _all_keys(model: PreTrainedModel, cache: Any) -> DynamicCache:
    if type(cache) is not DynamicCache or any(type(x) is not DynamicLayer for x in cache.layers):
        raise ModelError(_refused(model, "has layers that do not keep all keys (sliding windows)"))
    return cache


def _refused(model: PreTrainedModel, why: str) -> str:
    return (
        f"combine='windows' joins the keys of all pieces, and model type "
        f"{model.config.model_type!r} {why}: use combine='map'."
    )


def _joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    whole = DynamicCache()
    for index in range(len(caches[0].layers)):
        layers: list[Any] = [cache.layers[index] for cache in caches]
        keys: Tensor = torch.cat([layer.keys for layer in layers], dim=2)
        values: Tensor = torch.cat([layer.values for layer in layers], dim=2)
        whole.update(keys, values, index)
    return whole
