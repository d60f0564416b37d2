"""Training data: conversations or texts in, rows of token ids and labels out, and an account of it.

    prepared = prepare("chats.json", tokenizer, TokenizeSettings(max_length=16_384), salvage=True)
    print(prepared.report)            # what was kept, dropped and supervised: before training
    prepared.dataset                  # datasets.Dataset: input_ids, labels, length, record

Sources are files (.json, .jsonl, .parquet, .txt, also compressed), folders of shards, hub ids, and
"sample", the conversations that ship with the package. One source has one schema: mix sources with
`datasets.concatenate_datasets` or `interleave_datasets`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError, printable

from .chat_template import chat_template
from .conversations import Conversation, Schema, read_record, schema_of
from .data_report import COUNTS, DataReport
from .readers import SAMPLE, Records
from .tokenize import Encoder, Overflow, TokenizeSettings
from .turns import BadRecordError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "SAMPLE",
    "DataReport",
    "Overflow",
    "Prepared",
    "TokenizeSettings",
    "prepare",
]

Row: TypeAlias = dict[str, Any]

_BATCH = 64  # conversations that are tokenised at once
_SHOWN = 20  # names of fields in a note
_CHUNK = 1 << 26  # characters of the conversations that become one Arrow table


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows for the trainer."""

    dataset: Dataset
    """Columns input_ids, labels (int32 lists, −100 where nothing is learnt), length, and record,
    the number from 1 of the conversation in its source."""
    report: DataReport
    """What was kept and what was not."""


def prepare(
    source: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizeSettings | None = None,
    *,
    salvage: bool = False,
    split: str = "train",
    skip_bad: bool = False,
    workers: int = 1,
) -> Prepared:
    """Read, render, tokenise and label a source, whole.

    Args:
        source: a file, a folder, a hub id, or "sample".
        tokenizer: fast, with a chat template unless `settings.template` names one.
        settings: length, over-length policy, template, strictness.
        salvage: go on with the whole records of a file that breaks off.
        split: of a hub id, a folder, or a file with one list for each split.
        skip_bad: leave out records that cannot be used, and count them by reason, instead of
            refusing the source at the first.
        workers: processes that tokenise.

    Raises:
        DataError: the source cannot be read or understood, the template does not serve, or no
            sample is left.
    """
    settings = settings or TokenizeSettings()
    records = Records(source, salvage=salvage, split=split, skip_bad=skip_bad)
    told = _Told()
    raw = _table(_rows(records, told, skip_bad=skip_bad))
    if raw is None:
        raise DataError(f"{records.name}: no record is left. {'; '.join(told.notes())}.")
    document = raw[0]["roles"] == ["document"]
    encoder = _encoder(tokenizer, settings, document=document, skip_bad=skip_bad)
    try:
        encoded = raw.map(
            encoder,
            batched=True,
            batch_size=_BATCH,
            num_proc=workers if workers > 1 else None,
            remove_columns=raw.column_names,
            features=_features(),
            desc=printable(f"tokenising {records.name}"),
            # Hashing a tokenizer takes longer than tokenising many a file, and nothing is cached.
            new_fingerprint=f"longctx-{os.urandom(8).hex()}",
        )
    except DataError as error:
        raise DataError(f"{records.name}, {error}") from error
    arrays: Any = encoded.with_format("numpy")
    totals = np.zeros(len(COUNTS), dtype=np.int64)
    for part in encoded.select_columns(["counts", "unused"]).iter(10_000):
        columns: Any = part
        totals += np.sum(columns["counts"], axis=0, dtype=np.int64)
        told.unused.update(chain.from_iterable(columns["unused"]))
    report = _report(records, settings, totals, [*records.notes, *told.notes()])
    _refuse_nothing(report)
    full = np.flatnonzero(np.asarray(arrays["length"][:]))
    rows = encoded if len(full) == len(encoded) else encoded.select(full)
    rows = rows.remove_columns(["counts", "unused"])
    return Prepared(rows, report)


@dataclass(slots=True)
class _Told:
    """What is told of records: those left out, and fields that nothing was made of."""

    bad: Counter[str] = field(default_factory=Counter[str])
    first: dict[str, int] = field(default_factory=dict[str, int])
    unused: Counter[str] = field(default_factory=Counter[str])

    def notes(self) -> list[str]:
        """Lines for the report."""
        made = [
            f"record left out: {reason} (record {self.first[reason]:,})"
            if count == 1
            else f"records left out: {count:,} × {reason} (record {self.first[reason]:,} the first)"
            for reason, count in self.bad.most_common()
        ]
        if self.unused:
            shown = [f"{name!r:.40} ({count:,})" for name, count in self.unused.most_common(_SHOWN)]
            more = len(self.unused) - _SHOWN
            shown += [f"and {more:,} more"] * (more > 0)
            made.append(f"fields that are not used: {', '.join(shown)}")
        return made


def _rows(records: Records, told: _Told, *, skip_bad: bool) -> Iterator[Row]:
    """Records as rows of the encoder."""
    schema: Schema | None = None
    for number, record in enumerate(records, 1):
        where = f"{records.name}, record {number:,}"
        try:
            if isinstance(record, BadRecordError):
                raise record
            schema = schema or schema_of(record, where)
            found = read_record(record, schema, where) if schema else Conversation(())
        except BadRecordError as error:
            if not skip_bad:
                raise
            told.bad[error.reason] += 1
            told.first.setdefault(error.reason, number)
            continue
        told.unused.update(found.unused)
        turns = found.turns
        yield {
            "record": number,
            "roles": [turn.role for turn in turns],
            "texts": [turn.text for turn in turns],
            "learnt": [] if all(t.learnt for t in turns) else [turn.learnt for turn in turns],
            "fields": [turn.fields for turn in turns] if any(t.fields for t in turns) else [],
            "variables": found.variables,
            "unused": [],
        }


def _table(rows: Iterable[Row]) -> Dataset | None:
    """Rows in memory as Arrow, a chunk at a time; None for no rows."""
    from datasets import Dataset, Features, List, Value, concatenate_datasets

    text = List(Value("large_string"))
    features = Features(
        {
            "record": Value("int64"),
            "roles": text,
            "texts": text,
            "learnt": List(Value("bool")),
            "fields": text,
            "variables": Value("large_string"),
            "unused": text,
        }
    )
    chunks: list[Dataset] = []
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += sum(map(len, row["texts"]))
        if size > _CHUNK:
            chunks.append(Dataset.from_list(chunk, features=features))
            chunk, size = [], 0
    if chunk:
        chunks.append(Dataset.from_list(chunk, features=features))
    return concatenate_datasets(chunks) if chunks else None


def _encoder(
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizeSettings,
    *,
    document: bool,
    skip_bad: bool,
) -> Encoder:
    template = None if document else chat_template(tokenizer, settings.template)
    return Encoder(tokenizer, template, settings, skip_bad=skip_bad)


def _features() -> Any:
    from datasets import Features, List, Value

    ids, number = List(Value("int32")), Value("int64")
    return Features(
        {
            "record": number,
            "input_ids": ids,
            "labels": ids,
            "length": number,
            "counts": List(number),
            "unused": List(Value("string")),
        }
    )


def _report(
    records: Records, settings: TokenizeSettings, totals: Any, notes: Iterable[str]
) -> DataReport:
    counts = dict(zip(COUNTS, map(int, totals), strict=True))
    return DataReport(records.name, settings.max_length, **counts, notes=tuple(notes))


def _refuse_nothing(report: DataReport) -> None:
    if not report.samples:
        raise DataError(
            "no sample is left to train on: see below what became of the records. Pass data in "
            "which an assistant answers; where they are too long, raise max_length, or pass "
            f"overflow='cut' to keep their beginnings.\n{report}"
        )
