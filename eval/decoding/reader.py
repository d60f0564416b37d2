"""A decode bench as a report reads it, from the folder that `longctx decode-bench` wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from longctx.errors import DataError, RunError
from longctx.files import read_text
from longctx.schema import parse

from .result import TEXT, DecodeBench, Figure, LoopExample
from .settings import BenchSettings

__all__ = ["BENCH_FILE", "read_decode_benches"]

BENCH_FILE = "decodings.json"
_AGAIN = (
    "It is damaged, or another release wrote it. Run the same `longctx decode-bench` again with "
    "--overwrite; it goes on from its continuations."
)
_Number = Annotated[float, Meta(ge=-1e308, le=1e308)]
_Block = dict[str, "_Figure"]


class _Figure(Struct):
    """A figure; null where it is NaN."""

    value: _Number | None
    low: _Number | None
    high: _Number | None


class _Bench(Struct):
    """One model of decodings.json; see `DecodeBench`."""

    model: str
    settings: BenchSettings
    prompts: Annotated[int, Meta(ge=1)]
    documents: Annotated[int, Meta(ge=1)]
    model_block: _Block
    decoding_block: dict[str, _Block]
    identity: dict[str, str] = {}
    examples: dict[str, list[LoopExample]] = {}

    def __post_init__(self) -> None:
        if TEXT not in self.decoding_block:
            raise ValueError(f"decoding_block lacks {TEXT!r}")
        foreign = [name for name in self.examples if name not in self.decoding_block]
        if foreign:
            raise ValueError(f"examples of {foreign[0]!r}, which is not in decoding_block")


def read_decode_benches(folder: Path) -> tuple[DecodeBench, ...]:
    """The benches of a folder, one a model.

    Raises:
        RunError: no decodings.json, or a damaged one.
    """
    path = folder / BENCH_FILE
    try:
        text = read_text(path, "a decode bench")
    except DataError as error:
        raise RunError(f"{error} {_AGAIN}") from error
    kind: Any = Annotated[list[_Bench], Meta(min_length=1)]
    stored: list[_Bench] = parse(text, kind, path, next_step=_AGAIN)
    names = [bench.model for bench in stored]
    if len(set(names)) < len(names):
        raise RunError(f"{path}: two benches of one model name. {_AGAIN}")
    return tuple(map(_bench, stored))


def _bench(stored: _Bench) -> DecodeBench:
    return DecodeBench(
        model=stored.model,
        settings=stored.settings,
        prompts=stored.prompts,
        documents=stored.documents,
        model_block=_block(stored.model_block),
        decoding_block={name: _block(block) for name, block in stored.decoding_block.items()},
        identity=stored.identity,
        examples={name: tuple(those) for name, those in stored.examples.items()},
    )


def _block(stored: _Block) -> dict[str, Figure]:
    return {name: Figure(*map(_number, (f.value, f.low, f.high))) for name, f in stored.items()}


def _number(value: float | None) -> Any:
    return math.nan if value is None else value
