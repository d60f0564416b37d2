"""What a sweep gives back: one row per method, task and length, and the observations behind it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.errors import RunError
from longctx.fingerprint import json_digest

from ..tasks.shared.adaptive import Adaptive
from ..tasks.shared.protocol import Observation, Summary, Task
from ..tasks.shared.retrieval import Retrieval
from .records import Record
from .variants import Variant
from .verification import Verification

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Row", "SweepResult", "cell_key", "estimand_text", "frame_of", "rows_of"]


@dataclass(frozen=True, slots=True)
class Row:
    """A cell of the table. What could not be measured is NaN, and `failed` says why."""

    method: str
    """As the command line writes it; "none" is the model as it came."""
    factor: float | None
    """Window over original window, None where the method has no factor."""
    task: str
    length: int
    """Tokens."""
    value: float
    """Accuracy (0 to 1) or perplexity."""
    low: float
    """Lower end of the 95% interval, NaN where there is none."""
    high: float
    interval: str
    """Which interval, over what."""
    n: int
    """Prompts, or windows of text."""
    targets: int
    """Tokens that were scored."""
    nll: float
    """Mean over the targets, in nats."""
    prefix: float | None
    """Perplexity over all tokens before `length`, where the task has one."""
    window: int | None
    """Tokens the model claims to read with this method."""
    beyond_window: bool
    """Whether `length` is more than that."""
    tokens: int
    """Forwarded for this cell; of a pass shared by several lengths each pays for what it adds."""
    seconds: float
    """Measured, shared out like `tokens`."""
    estimand: str
    """What exactly `value` estimates."""
    failed: str | None = None
    """Why there is no value."""
    far: int | None = None
    """Prompts whose key ends further back from the answer than the original window is long; None
    where the task hides none."""
    far_found: int | None = None
    """How many of those keys were found."""
    cache_bytes: int | None = None
    """Held by the cache of one prompt at its end (of the largest one); None where no row of the
    sweep has a compressed one."""


def cell_key(method: str, task: Task, length: int, adaptive: Adaptive | None) -> str:
    """Name a cell: two reports that share it asked the same of the same texts.

    Which windows and haystacks of them depends on the longest length of the sweep too.
    """
    rule = "" if adaptive is None else f" {adaptive}"
    return f"{method} {task.name} {json_digest(task.report_identity())} {length}{rule}"


def estimand_text(task: Task, adaptive: Adaptive | None) -> str:
    """What the figures of a task are, and that they were stopped early where they were."""
    if adaptive is None or not isinstance(task, Retrieval):
        return task.estimand
    return f"{task.estimand}; each cell was asked only until it was decided (its n says how far)"


def rows_of(
    variant: Variant,
    task: Task,
    lengths: Sequence[int],
    records: Sequence[Record],
    adaptive: Adaptive | None = None,
    *,
    original_window: int | None = None,
) -> list[Row]:
    """Summarise the records of one method and task into a row per length.

    Args:
        variant: the method.
        task: the task.
        lengths: in tokens.
        records: of this method and task.
        adaptive: the rule by which cells were asked no further.
        original_window: tokens beyond which a key counts as far; None counts none.
    """
    said = estimand_text(task, adaptive)
    rows = [
        _row(variant, task, length, [r for r in records if length in r.lengths], said)
        for length in lengths
    ]
    if original_window is None:
        return rows
    observed = [o for record in records for o in record.observations]
    return [_with_far_keys(row, observed, original_window) for row in rows]


def _with_far_keys(row: Row, observed: Sequence[Observation], window: int) -> Row:
    """Count the keys beyond the window, where every prompt says how far back its key is."""
    own = [o for o in observed if o.length == row.length]
    distances: list[int | None] = [o.detail.get("distance") for o in own]
    if row.failed or not own or None in distances:
        return row
    answers = [o.correct for o, d in zip(own, distances, strict=True) if d and d >= window]
    return dataclasses.replace(row, far=len(answers), far_found=sum(map(bool, answers)))


def _row(variant: Variant, task: Task, length: int, records: list[Record], said: str) -> Row:
    observations = [o for record in records for o in record.observations if o.length == length]
    targets = sum(o.targets for o in observations)
    summary = task.summarise(observations)
    failed = next((record.failed for record in records if record.failed), None)
    if not failed and (broken := sum(math.isnan(o.nll) for o in observations)):
        failed = f"the logits hold NaN or infinity in {broken} of {len(observations)}"
    if failed:  # figures over what happened to fit would be others
        summary = Summary(math.nan, math.nan, math.nan, "none")
    cost = [(share, record) for record in records if (share := _share(record, length))]
    return Row(
        method=variant.label,
        factor=variant.factor,
        task=task.name,
        length=length,
        value=summary.value,
        low=summary.low,
        high=summary.high,
        interval=summary.interval,
        n=len(observations),
        targets=targets,
        nll=_mean_nll(observations),
        prefix=summary.prefix,
        window=variant.window,
        beyond_window=variant.window is not None and length > variant.window,
        tokens=round(sum(share * record.tokens for share, record in cost)),
        seconds=round(sum(share * record.seconds for share, record in cost), 3),
        estimand=said,
        failed=failed,
        cache_bytes=max(
            (r.cache_bytes for r in records if r.cache_bytes is not None), default=None
        ),
    )


def _mean_nll(observations: Sequence[Observation]) -> float:
    targets = sum(o.targets for o in observations)
    return math.fsum(o.nll for o in observations) / targets if targets else math.nan


def _share(record: Record, length: int) -> float:
    """The part of a pass over several lengths that this one adds to the next shorter."""
    below = [other for other in record.lengths if other < length]
    return (length - max(below, default=0)) / max(record.lengths)


def frame_of(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a pandas DataFrame."""
    import pandas as pd

    frame = pd.DataFrame([dataclasses.asdict(row) for row in rows])
    if all(row.cache_bytes is None for row in rows):
        del frame["cache_bytes"]
    counts = {"window", "far", "far_found", "cache_bytes"} & {*frame.columns}
    return frame.astype(dict.fromkeys(counts, "Int64"))


@dataclass(frozen=True, slots=True)
class SweepResult:
    """All cells of a sweep, and how they came about."""

    model: str
    """Its hub id, the name of its folder, or its type."""
    identity: dict[str, str]
    """Digests of model, tokenizer and chat template, and the attention implementation's name."""
    original_window: int | None
    """Tokens the model was trained to read."""
    lengths: tuple[int, ...]
    tasks: tuple[Task, ...]
    variants: tuple[Variant, ...]
    rows: tuple[Row, ...]
    records: tuple[Record, ...]
    """The observations behind the rows."""
    notes: tuple[str, ...]
    """What a reader must know besides, such as documents left out."""
    results: Path | None
    """The JSON lines that the records are in."""
    verified: tuple[Verification, ...] = ()
    """Answers that were generated too."""
    adaptive: Adaptive | None = None
    """The rule by which cells were asked no further; None if all prompts were."""

    def row(self, method: str, task: str, length: int) -> Row:
        """The row of one cell.

        Raises:
            RunError: it was not measured.
        """
        for row in self.rows:
            if (row.method, row.task, row.length) == (method, task, length):
                return row
        raise RunError(
            f"no cell {method!r}, {task!r}, {length}: measured are the methods "
            f"{', '.join(v.label for v in self.variants)}, the tasks "
            f"{', '.join(t.name for t in self.tasks)}, the lengths {self.lengths}."
        )

    def frame(self) -> pd.DataFrame:
        """The rows as a pandas DataFrame."""
        return frame_of(self.rows)

    def per_token(self) -> pd.DataFrame:
        """Every scored token of text: method, document, length, index, context, token, nll.

        `index` is the token's place in its document, `context` the tokens before it in its window
        (a BOS counts), `nll` in nats.

        Raises:
            RunError: the sweep was given no `results` file, beside which they are kept.
        """
        import pandas as pd

        if self.results is None:
            raise RunError(
                "scores of single tokens are kept beside a results file: pass results=… to sweep."
            )
        folder = self.results.parent / "tokens"
        keys = [record.key for record in self.records if record.per_token]
        frames = [pd.read_parquet(folder / f"{key}.parquet") for key in keys]
        if not frames:
            raise RunError("no task of this sweep scores text: add 'perplexity'.")
        return pd.concat(frames, ignore_index=True)
