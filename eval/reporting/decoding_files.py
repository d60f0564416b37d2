"""The files of a decode bench: CSV, JSON, and a picture as PNG and SVG."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture

from longctx.errors import RunError
from longctx.files import finite, write_whole
from longctx.folders import refuse_other_than_file

from ..decoding.result import DecodeBench
from .palette import COLOURS

__all__ = ["refuse_taken_bench", "write_decode_bench"]

_NAME = "decodings"


def refuse_taken_bench(folder: Path, overwrite: bool) -> None:
    """Refuse a folder whose table would be lost: before work is done.

    Raises:
        RunError: a table is there, or something that is not a file stands in its place.
    """
    for ending in (".csv", ".json", ".png", ".svg"):
        path = folder / f"{_NAME}{ending}"
        refuse_other_than_file(path)
        if path.exists() and not overwrite:
            raise RunError(
                f"{path} is there: name another folder, or pass overwrite to replace it (what "
                "was generated is kept)."
            )


def write_decode_bench(benches: Sequence[DecodeBench], folder: Path | str) -> list[Path]:
    """Write decodings.csv, .json, .png and .svg; returns their paths.

    Raises:
        RunError: something that is not a file stands in the place of one.
        OSError: the disk refuses.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "model": bench.model,
            "decoding": decoding,
            "figure": name,
            **dataclasses.asdict(figure),
        }
        for bench in benches
        for decoding, block in (("", bench.model_block), *bench.decoding_block.items())
        for name, figure in block.items()
    ]
    whole: Any = [finite(dataclasses.asdict(bench)) for bench in benches]
    picture = _picture(benches)

    def write_csv(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(finite(rows))

    def write_json(path: Path) -> None:
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    return [
        write_whole(folder / f"{_NAME}.csv", write_csv),
        write_whole(folder / f"{_NAME}.json", write_json),
        *(
            write_whole(
                folder / f"{_NAME}.{kind}",
                lambda path, kind=kind: picture.savefig(path, format=kind),
            )
            for kind in ("png", "svg")
        ),
    ]


def _picture(benches: Sequence[DecodeBench]) -> Picture:
    """seq-rep-4 and different tokens for each decoding, a colour for each model."""
    shown = ("seq-rep-4", "different tokens", "keys")
    names = list(dict.fromkeys(name for bench in benches for name in bench.decoding_block))
    picture = Picture(figsize=(12, 1.2 + 0.34 * len(names) * max(1, len(benches))), dpi=120)
    FigureCanvasAgg(picture)
    axes: Any = picture.subplots(1, len(shown), sharey=True)
    height = 0.8 / len(benches)
    for ax, figure in zip(axes, shown, strict=True):
        for turn, bench in enumerate(benches):
            for place, name in enumerate(names):
                found = bench.decoding_block.get(name, {}).get(figure)
                if found is None:
                    continue
                bounds = [[found.value - found.low], [found.high - found.value]]
                ax.errorbar(
                    [found.value],
                    [place + (turn - (len(benches) - 1) / 2) * height],
                    xerr=bounds if found.low == found.low else None,
                    fmt="o",
                    color=COLOURS[turn % len(COLOURS)].light,
                    label=bench.model if place == 0 else None,
                )
        ax.set_title(figure)
        ax.grid(axis="x", alpha=0.3)
        ax.set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    if len(benches) > 1:
        # The text itself, whose points have the labels, has no keys.
        axes[-1].legend(*axes[0].get_legend_handles_labels())
    picture.tight_layout()
    return picture
