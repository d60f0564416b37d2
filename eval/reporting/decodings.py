"""A decode bench as tables for the terminal, as files, and as a picture."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from longctx.files import finite, write_whole
from longctx.folders import refuse_other_than_file

from ..decoding.bench import TEXT, DecodeBench
from ..decoding.figures import Figure
from .palette import COLOURS
from .tables import plain, show

__all__ = ["print_decode_bench", "refuse_taken_bench", "write_decode_bench"]

_NAME = "decodings"
_SHARES = ("accuracy", "rep/", "wrep/", "seq-rep-", "loops", "keys")
_SHOWN = (
    *("seq-rep-1", "seq-rep-4", "different tokens", "loops", "entropy"),
    *("self-BLEU", "cross-BLEU", "keys"),
)


def print_decode_bench(benches: Sequence[DecodeBench], console: Console | None = None) -> None:
    """Print a block for the models, and one for each model and its decodings."""
    show([_model_table(benches), *map(_decoding_table, benches)], console)


def _model_table(benches: Sequence[DecodeBench]) -> RenderableType:
    columns = list(benches[0].model_block)
    table = _table("models, on real text", "model", columns)
    for bench in benches:
        table.add_row(plain(bench.model), *(_cell(bench.model_block, name) for name in columns))
    said = (
        "teacher-forced: ppl exp(mean NLL), accuracy of the next token, rep/l the share of "
        "predictions among the l tokens before, wrep/l those of them that are wrong"
    )
    return Group(table, plain(said, style="dim"), _interval(benches[0]), Text())


def _decoding_table(bench: DecodeBench) -> RenderableType:
    blocks = bench.decoding_block
    columns = [name for name in _SHOWN if any(name in block for block in blocks.values())]
    table = _table(f"decodings · {bench.model}", "decoding", columns)
    for name, block in blocks.items():
        table.add_row(
            plain(name, style="dim" if name == TEXT else ""),
            *(_cell(block, column) for column in columns),
        )
    guard = "" if bench.settings.guard == "none" else f", guard {bench.settings.guard}"
    said = (
        f"continuations of {bench.settings.new_tokens} tokens after {bench.prompts} prompts of "
        f"{bench.settings.prompt_tokens}{guard}; loops: ends in three copies of the same; entropy "
        "in bits, of all tokens together; self-BLEU: samples of one prompt, cross-BLEU: different "
        "prompts; keys: passkeys said"
    )
    return Group(table, plain(said, style="dim"), _interval(bench), Text())


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=plain(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _interval(bench: DecodeBench) -> Text:
    return Text(
        f"interval: t over {bench.documents} documents, 95%; Wilson for loops and keys", style="dim"
    )


def _cell(block: dict[str, Figure], name: str) -> Text:
    if name not in block:
        return Text("–")
    figure, share = block[name], name.startswith(_SHARES)
    text = Text(_number(figure.value, share))
    if figure.low == figure.low:  # not NaN
        text.append(f"\n{_number(figure.low, share)}–{_number(figure.high, share)}", style="dim")
    return text


def _number(value: float, share: bool) -> str:
    return f"{max(0.0, value):.3f}" if share else f"{value:.3g}"


def refuse_taken_bench(folder: Path, overwrite: bool) -> None:
    """Refuse a folder whose table would be lost: before work is done.

    Raises:
        RunError: a table is there, or something that is not a file stands in its place.
    """
    from longctx.errors import RunError

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
        axes[-1].legend()
    picture.tight_layout()
    return picture
