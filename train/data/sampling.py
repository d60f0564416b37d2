"""In which order documents reach the trainer: row i is a function of the seed and i alone.

    Epochs(packed_rows, rows=1_000)                                  # each row once an epoch
    Mixture((MixtureWeight("chats", DocumentSource(dataset), 0.5),   # drawn anew for each row, at
             MixtureWeight("passkeys", Passkeys(tokenizer, texts), 0.5)),  # the step's own length
            rows=2_000, rows_per_step=2, row_tokens=2_048, positions=LengthSchedule(…))

So an interrupted run goes on with exactly the rows it has not seen, without reading those it has,
and any number of processes sees the same rows as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch.utils.data

from longctx.errors import DataError, RunError, TooShortError

from ..positions import Positions
from .tokenize import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DocumentSource", "Epochs", "Mixture", "MixtureWeight", "Source", "TrainDataset"]

Ids: TypeAlias = list[int]
_PERIOD = 1_000  # documents after which the order of kinds repeats


class TrainDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """What the trainer reads: rows for `collate.Collator`, by number."""

    shares: tuple[float, ...] = (1.0,)
    """Of the loss, for each kind of document."""

    def __len__(self) -> int:
        """Rows of the whole run."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`."""
        raise NotImplementedError


class Epochs(TrainDataset):
    """The rows of a dataset, each once an epoch, every epoch in an order of its own."""

    def __init__(self, dataset: Dataset, rows: int, *, seed: int = 0) -> None:
        if not len(dataset) or rows < 1:
            raise RunError(f"{rows} rows of a dataset of {len(dataset)}: expected one or more.")
        self.dataset = dataset
        self.rows = rows
        self.seed = seed
        self._order: tuple[int, np.ndarray[Any, Any]] = (-1, np.empty(0))

    def __len__(self) -> int:
        """Rows of the whole run."""
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`; "draw" is the epoch, which moves the positions that are drawn."""
        epoch, place = divmod(index, len(self.dataset))
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = epoch, rng.permutation(len(self.dataset))
        row = self.dataset[int(self._order[1][place])]
        return {**row, "draw": epoch}


class Source(Protocol):
    """Documents of any length that is asked for."""

    def document(self, tokens: int, rng: Random) -> tuple[Ids, Ids]:
        """Draw token ids and labels of a document of at most `tokens` tokens."""
        ...


class DocumentSource:
    """A random row of a prepared dataset, by its length; where that is too much, a stretch of it.

    Args:
        dataset: columns input_ids and labels.
        keep: a first token that stays in front of a stretch from the middle (BOS).
    """

    def __init__(self, dataset: Dataset, keep: int | None = None) -> None:
        self.dataset = dataset
        self.keep = keep
        lengths = [len(ids) for ids in dataset.with_format("numpy")["input_ids"]]
        self._ends = np.cumsum(lengths)

    def document(self, tokens: int, rng: Random) -> tuple[Ids, Ids]:
        """Draw a row, each token of the dataset as likely as the next, and a stretch of it."""
        place = rng.randrange(int(self._ends[-1]))
        row: Any = self.dataset[int(np.searchsorted(self._ends, place, side="right"))]
        ids, labels = list(row["input_ids"]), list(row["labels"])
        if len(ids) <= tokens:
            return ids, labels
        learnt = [place for place in range(1, len(ids)) if labels[place] != IGNORED]
        wanted = rng.choice(learnt)
        first = rng.randint(max(0, wanted - tokens + 1), min(wanted - 1, len(ids) - tokens))
        ids, labels = ids[first : first + tokens], labels[first : first + tokens]
        if first and self.keep is not None:
            ids, labels = [self.keep, *ids[1:]], [IGNORED, *labels[1:]]
        return ids, labels


@dataclass(frozen=True, slots=True)
class MixtureWeight:
    """A source and how much of the training it is."""

    name: str
    source: Source
    share: float
    """Of the documents, and of the loss: its tokens are averaged apart from those of the others."""

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise RunError(f"share={self.share} of {self.name}: expected a number above 0.")


class Mixture(TrainDataset):
    """Packed rows drawn from several sources, at the length that a policy gives each step."""

    def __init__(
        self,
        shares: Sequence[MixtureWeight],
        *,
        rows: int,
        rows_per_step: int,
        row_tokens: int,
        positions: Positions,
        seed: int = 0,
    ) -> None:
        if not shares or rows < 1 or rows_per_step < 1 or row_tokens < 2:
            raise RunError(
                f"{rows} rows of {row_tokens} tokens from {len(shares)} sources, {rows_per_step} a "
                "step: expected a source, a row and 2 tokens at least."
            )
        total = sum(share.share for share in shares)
        self.sources = tuple(shares)
        self.shares = tuple(share.share / total for share in shares)
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.row_tokens = row_tokens
        self.positions = positions
        self.seed = seed
        self._kinds = _interleaved(self.shares)

    def __len__(self) -> int:
        """Rows of the whole run."""
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`: documents of the step's length, one after the other until it is full."""
        limit = self.positions.tokens(index // self.rows_per_step) or self.row_tokens
        limit = min(limit, self.row_tokens)
        rng = Random(f"mixture/{self.seed}/{index}")
        ids: Ids = []
        labels: Ids = []
        lengths: list[int] = []
        kinds: list[int] = []
        slot = index * (self.row_tokens // limit)
        while (room := self.row_tokens - len(ids)) >= max(limit // 2, 2):
            kind = self._kinds[(slot + len(lengths)) % _PERIOD]
            try:
                more, learnt = self.sources[kind].source.document(min(limit, room), rng)
            except TooShortError:
                if not lengths:
                    raise
                break  # the rest of the row stays empty
            if not 0 < len(more) <= room or len(more) != len(learnt):
                raise DataError(
                    f"source {self.sources[kind].name} gave {len(more)} tokens and {len(learnt)} "
                    f"labels where at most {min(limit, room)} were asked for."
                )
            ids += more
            labels += learnt
            lengths.append(len(more))
            kinds.append(kind)
        row = {"input_ids": ids, "labels": labels, "seq_lengths": lengths, "kinds": kinds}
        return {**row, "draw": index}


def _interleaved(shares: Sequence[float]) -> list[int]:
    """Kinds in turn, each as often as its share says and as evenly spread as can be."""
    given = [0] * len(shares)
    order: list[int] = []
    for number in range(1, _PERIOD + 1):
        kind = max(range(len(shares)), key=lambda k: shares[k] * number - given[k])
        given[kind] += 1
        order.append(kind)
    return order
