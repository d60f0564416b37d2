"""What a report shows of decode benches: two tables, a picture, and loops to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..decoding.reader import read_decode_benches
from ..decoding.result import INTERVALS, TEXT, DecodeBench, Figure
from .decoding_tables import MODEL_ESTIMAND, decoding_estimand, written
from .scatter import decoding_styles, scatter
from .sections import visible

__all__ = ["decoding_section", "read_benches"]

_FIGURES = (
    *("seq-rep-1", "seq-rep-2", "seq-rep-3", "seq-rep-4", "different tokens", "uniq-seq"),
    *("loops", "entropy", "self-BLEU", "cross-BLEU", "keys"),
)
"""Of decodings, in the order of the columns."""
_DRAWN = (("seq-rep-4", "different tokens"), ("cross-BLEU", "entropy"))
"""What is drawn across and up: within a continuation, and between those of different prompts."""
_PROMPT = 160  # characters of a prompt's end that are shown


def read_benches(folders: Sequence[Path]) -> list[DecodeBench]:
    """The benches of some folders; models that are called the same are told apart.

    Raises:
        RunError: a damaged decodings.json.
    """
    found = [(folder, bench) for folder in folders for bench in read_decode_benches(folder)]
    models = [bench.model for _, bench in found]
    names = [
        bench.model
        if models.count(bench.model) == 1
        else f"{bench.model} ({folder.resolve().name})"
        for folder, bench in found
    ]
    return [
        dataclasses.replace(bench, model=name if names.count(name) == 1 else f"{name} #{number}")
        for number, (name, (_, bench)) in enumerate(zip(names, found, strict=True), 1)
    ]


def decoding_section(benches: Sequence[DecodeBench]) -> dict[str, Any]:
    """All of them, or none, in words and places.

    Returns:
        `models`: a table with a row for each; `benches`: for each its table of decodings, `drawn`
        (see `scatter`), `loops` and what else is told of it; `intervals` in words; `looks` of all
        decodings.
    """
    looks = decoding_styles(benches)
    columns = list(benches[0].model_block) if benches else []
    return {
        "models": {
            "columns": columns,
            "rows": [(b.model, _cells(b.model_block, columns)) for b in benches],
            "estimand": MODEL_ESTIMAND,
        },
        "benches": [
            {
                **_bench(bench),
                "drawn": [scatter(bench, benches, looks, pair) for pair in _DRAWN],
            }
            for bench in benches
        ],
        "intervals": INTERVALS,
        "looks": looks,
    }


def _bench(bench: DecodeBench) -> dict[str, Any]:
    blocks = bench.decoding_block
    columns = [name for name in _FIGURES if any(name in block for block in blocks.values())]
    return {
        "model": bench.model,
        "prompts": bench.prompts,
        "documents": bench.documents,
        "estimand": decoding_estimand(bench),
        "identity": bench.identity,
        "settings": dataclasses.asdict(bench.settings),
        "columns": columns,
        "rows": [(name, name == TEXT, _cells(block, columns)) for name, block in blocks.items()],
        "loops": [
            {
                "decoding": name,
                "share": blocks[name]["loops"].value,
                "examples": [
                    {
                        "document": example.document,
                        "prompt": visible(example.prompt[-_PROMPT:]),
                        "cut": len(example.prompt) > _PROMPT,
                        "before": visible(example.before),
                        "loop": visible(example.loop),
                    }
                    for example in examples
                ],
            }
            for name, examples in bench.examples.items()
        ],
    }


def _cells(block: dict[str, Figure], columns: Sequence[str]) -> list[tuple[str, str]]:
    """Value and interval as they are written; a dash where there is none."""
    return [written(name, block[name]) if name in block else ("–", "") for name in columns]
