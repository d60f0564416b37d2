"""What the files of evaluation hold, as types that they are checked against when they are read.

JSON has no NaN: a figure that is missing is null there. Keys that no type names are passed over,
except in results, where a file of another release would be taken for one of this.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta, Struct

__all__ = [
    "ResultsHeader",
    "StoredCells",
    "StoredObservation",
    "StoredRecord",
    "StoredRow",
    "StoredScores",
    "StoredSweep",
    "StoredTask",
]

Count = Annotated[int, Meta(ge=0, le=10**15)]
Length = Annotated[int, Meta(ge=1, le=10**12)]
Figure = Annotated[float, Meta(ge=-1e308, le=1e308)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0, le=1e15)]
Lengths = Annotated[list[Length], Meta(min_length=1)]
Key = Annotated[str, Meta(min_length=1, max_length=200)]
"""Names a file too."""


class _Detail(TypedDict, total=False):
    """Those details of an observation that tables, reports and comparisons read."""

    wanted_depth: Share
    depth: Share | None
    argmax_ids: list[int]
    prefix_nll: Figure | None
    prefix_targets: Count
    seq_rep_4: Share | None
    score: Share | None
    part: str
    said_ids: list[int]


class StoredObservation(Struct, forbid_unknown_fields=True):
    """A prompt or window of a record; see `Observation`."""

    length: Length
    item: str
    cluster: str
    nll: Figure | None
    targets: Count
    correct: bool | None = None
    detail: dict[str, Any] = {}

    def __post_init__(self) -> None:
        try:
            msgspec.convert(self.detail, _Detail)
        except msgspec.ValidationError as error:
            what, _, key = str(error).partition(" - at `$.")
            raise ValueError(f"{what} in detail.{key.rstrip('`')}") from error


class StoredRecord(Struct, forbid_unknown_fields=True):
    """A line of results.jsonl or lm_eval.jsonl; see `Record`."""

    key: Key
    method: str
    task: str
    lengths: Lengths
    tokens: Count
    seconds: Seconds
    how: str
    observations: list[StoredObservation]
    failed: str | None = None
    per_token: bool = False
    cache_bytes: Count | None = None


class ResultsHeader(Struct):
    """The first line of results; the digests of model and tokenizer stand beside these keys."""

    longctx: Literal["results"]
    version: Literal[2]


class StoredRow(Struct):
    """A cell of a table in sweep.json; see `Row`."""

    method: str
    factor: Figure | None
    task: str
    length: Length
    value: Figure | None
    low: Figure | None
    high: Figure | None
    interval: str
    n: Count
    targets: Count
    nll: Figure | None
    prefix: Figure | None
    window: Length | None
    beyond_window: bool
    tokens: Count
    seconds: Seconds
    estimand: str
    failed: str | None = None
    far: Count | None = None
    far_found: Count | None = None
    cache_bytes: Count | None = None


class StoredMethod(Struct):
    """A method in sweep.json: as the command line writes it, and its fields."""

    label: str
    method: dict[str, Any] | None


class StoredTask(Struct):
    """A task in sweep.json."""

    name: str
    estimand: str
    scale: Literal["share", "perplexity"]
    higher_is_better: bool
    figure: str | None
    spec: dict[str, Any]
    scope: dict[str, Any] | None = None
    """None: the same as `spec`."""


class StoredVerification(Struct):
    """Answers that were generated too, in sweep.json; see `Verification`."""

    method: str
    task: str
    checked: Count
    disagreements: list[str]
    lost: list[str] = []


class StoredCells(Struct):
    """As much of sweep.json as tells what would be lost with it."""

    identity: dict[str, str]
    cells: list[str]


class StoredSweep(StoredCells, kw_only=True):
    """sweep.json."""

    model: str
    original_window: Length | None
    lengths: Lengths
    methods: Annotated[list[StoredMethod], Meta(min_length=1)]
    tasks: Annotated[list[StoredTask], Meta(min_length=1)]
    notes: list[str]
    rows: list[StoredRow]
    records: list[str]
    adaptive: str | None = None
    verified: list[StoredVerification] = []

    def __post_init__(self) -> None:
        if "tokenizer" not in self.identity:
            raise ValueError("identity lacks the digest of the tokenizer")
        shares = {task.name for task in self.tasks if task.scale == "share"}
        for number, row in enumerate(self.rows):
            if row.task in shares and row.value is not None and not 0 <= row.value <= 1:
                raise ValueError(f"rows[{number}].value: expected a share from 0 to 1")


class StoredScore(Struct):
    """As much of a row of lm_eval.json as tells which one it is."""

    method: str
    task: str
    length: Length


class StoredScores(Struct):
    """lm_eval.json."""

    rows: list[StoredScore]
