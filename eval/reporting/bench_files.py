"""The files of a comparison of decodings: CSV, JSON, plot; each complete or not there."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from longctx.errors import RunError
from longctx.files import finite, write_whole
from longctx.schema import parse

from ..decoding.bench import cells_of
from ..decoding.result import BenchModel, BenchRow, DecodeBench, Figure
from ..decoding.settings import BenchSettings
from .files import refuse_lost_cells

__all__ = ["holds_bench", "read_decode_bench", "refuse_lost_bench", "write_decode_bench"]

_STEM = "decode_bench"
_AGAIN = "Run the same `longctx decode-bench` again: known results are not computed again."


def refuse_lost_bench(
    folder: Path, models: Sequence[str], decodings: Sequence[str], settings: BenchSettings
) -> None:
    """Refuse a folder whose report holds models or decodings that this one lacks.

    Raises:
        RunError: it does, has other settings, or holds files that are not a report.
    """
    refuse_lost_cells(folder, {}, cells_of(models, decodings, settings), stem=_STEM)


def write_decode_bench(
    result: DecodeBench, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> list[Path]:
    """Write decode_bench.json, .csv, .png and .svg; returns their paths.

    Args:
        result: of `decode_bench`.
        folder: is made if need be.
        overwrite: replace a report that holds more than this one.

    Raises:
        RunError: such a report is there, or the folder cannot be written.
    """
    from .bench_plots import draw_decode_bench  # matplotlib takes long

    folder = Path(folder)
    models, labels = [m.name for m in result.models], [label for label, _ in result.decodings]
    if not overwrite:
        refuse_lost_bench(folder, models, labels, result.settings)
    report = {
        **finite(dataclasses.asdict(result)),
        "identity": {},
        "cells": cells_of(models, labels, result.settings),
    }
    text, frame = json.dumps(report, indent=1, allow_nan=False), result.frame()
    picture = draw_decode_bench(result)
    writers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda path: path.write_text(text, encoding="utf-8"),
        ".csv": lambda path: frame.to_csv(path, index=False),
        ".png": lambda path: picture.savefig(path, format="png", dpi=150),
        ".svg": lambda path: picture.savefig(path, format="svg"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [write_whole(folder / f"{_STEM}{end}", write) for end, write in writers.items()]
    except OSError as error:
        raise RunError(
            f"cannot write the report to {folder}: {error}. Make room, or name another folder."
        ) from error


def holds_bench(folder: Path) -> bool:
    """Whether a folder holds what `longctx decode-bench --out` wrote at its end."""
    return (folder / f"{_STEM}.json").is_file()


class _StoredFigure(msgspec.Struct):
    metric: str
    value: float | None
    low: float | None
    high: float | None
    interval: str
    n: int


class _StoredRow(msgspec.Struct):
    block: str
    model: str
    decoding: str
    figures: list[_StoredFigure]


class _StoredModel(msgspec.Struct):
    name: str
    identity: dict[str, str]
    window: int | None
    prompts: int
    documents: int
    window_tokens: int
    key_tokens: int | None


class _StoredBench(msgspec.Struct):
    settings: dict[str, Any]
    decodings: list[tuple[str, str]]
    models: list[_StoredModel]
    rows: list[_StoredRow]
    notes: list[str]


def read_decode_bench(folder: Path) -> DecodeBench:
    """Read the folder that `longctx decode-bench --out` wrote.

    Raises:
        RunError: no report in it, or a damaged one.
    """
    path = folder / f"{_STEM}.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: expected JSON that can be read ({error}). {_AGAIN}") from error
    stored = parse(text, _StoredBench, path, next_step=_AGAIN)
    known = {field.name for field in dataclasses.fields(BenchSettings)}
    settings = {key: value for key, value in stored.settings.items() if key in known}
    if isinstance(settings.get("text"), list):
        settings["text"] = tuple(settings["text"])
    rows: list[BenchRow] = []
    for row in stored.rows:
        if row.block not in ("model", "decoding"):
            raise RunError(f"{path}: a row of the block {row.block!r}: damaged. {_AGAIN}")
        figures = tuple(
            Figure(f.metric, _number(f.value), _number(f.low), _number(f.high), f.interval, f.n)
            for f in row.figures
        )
        rows.append(BenchRow(row.block, row.model, row.decoding, figures))  # pyright: ignore[reportArgumentType]
    return DecodeBench(
        settings=BenchSettings(**settings),
        decodings=tuple(stored.decodings),
        models=tuple(BenchModel(**msgspec.structs.asdict(model)) for model in stored.models),
        rows=tuple(rows),
        notes=tuple(stored.notes),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
