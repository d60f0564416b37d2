"""Splitting a batch into stretches of consecutive tokens: its unpadded rows, or its documents.

A rule for the attention of one such span needs no mask. Rows of a batch whose spans agree are
computed together.

Legend: B batch, S queries, N keys, the last query on the last key.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError
from .hook import positions_in_rows

__all__ = ["Span", "spans_of"]


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens that see those before them in the span and nothing else."""

    rows: tuple[int, ...]
    """Of the batch."""
    queries: slice
    keys: slice
    first_position: int
    """Of its first query in tokens, as its keys are cached (`hook.positions_in_rows`)."""
    first_index: int
    """Of its first query, counted from the span's first token, dropped ones included."""


def spans_of(
    mask: Tensor | None, positions: Tensor, batch: int, queries: int, keys: int
) -> list[Span]:
    """The spans of a batch.

    Args:
        mask: one of the kinds of `hook.py`.
        positions: of the queries, in tokens, [B or 1, S].
        batch: B.
        queries: S.
        keys: N. A compact mask may name fewer; it names more where a cache has dropped keys, each
            row's between its first tokens and those that are seen next. Places of keys then count
            from the end.

    Raises:
        ModelError: a mask that is neither padding nor documents, or positions that skip.
    """
    if mask is not None and (mask.shape[-3:-1] != (1, 1) or mask.is_floating_point()):
        raise ModelError(
            f"an attention mask of shape {[*mask.shape]} ({mask.dtype}): a method that changes "
            "distances reads whole rows, padded rows and packed documents. Pass attention_mask as "
            "[batch, tokens]."
        )
    written = keys if mask is None else mask.shape[-1]
    dropped = max(0, written - keys)
    keys = written - dropped
    offset = keys - queries
    places = positions.expand(batch, -1)
    found: dict[tuple[int, int, int, int], list[int]] = defaultdict(list)
    if mask is None:
        for row, first in enumerate(places[:, 0].tolist()):
            # Where keys came before, their number does not tell how many were dropped.
            index = 0 if queries == keys else int(first)
            found[0, keys, int(first), index].append(row)
    else:
        counted = positions_in_rows(positions, mask).expand(batch, -1)
        for row, kinds in enumerate(mask[:, 0, 0].expand(batch, -1)):
            for first, end in _stretches(kinds):
                start, stop = max(0, first - dropped), end - dropped
                if stop > offset:
                    index = max(0, written - queries - first)
                    position = int(counted[row, max(0, start - offset)])
                    found[start, stop, position, index].append(row)
    spans = [
        Span(
            tuple(rows),
            slice(max(0, start - offset), stop - offset),
            slice(start, stop),
            position,
            index,
        )
        for (start, stop, position, index), rows in found.items()
    ]
    for span in spans:
        _refuse_skipping(places, span)
    return spans


def _stretches(kinds: Tensor) -> list[tuple[int, int]]:
    """Where each stretch of a row begins and ends (exclusive): what is real, or each document."""
    values, counts = torch.unique_consecutive(kinds, return_counts=True)
    stops = counts.cumsum(0)
    found = [
        (stop - count, stop)
        for value, count, stop in zip(values.tolist(), counts.tolist(), stops.tolist(), strict=True)
        if kinds.dtype != torch.bool or value
    ]
    if kinds.dtype == torch.bool and len(found) > 1:
        raise ModelError(
            f"a row of {len(kinds)} tokens with padding inside its text: expected padding on the "
            "left or on the right; pack documents by their numbers instead."
        )
    return found


def _refuse_skipping(places: Tensor, span: Span) -> None:
    steps = places[list(span.rows), span.queries].diff(dim=1)
    if not bool((steps == 1).all()):
        raise ModelError(
            "position_ids that skip or go backwards within a text (PoSE, random positions): a "
            "method that changes distances counts them from consecutive tokens. Leave position_ids "
            'out, or train with positions="full".'
        )
