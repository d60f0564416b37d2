"""A decode bench as tables for the terminal, and how its figures are written and explained."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..decoding.result import INTERVALS, TEXT, DecodeBench, Figure
from .tables import plain, show

__all__ = ["MODEL_ESTIMAND", "decoding_estimand", "print_decode_bench", "written"]

_SHARES = ("accuracy", "rep/", "wrep/", "seq-rep-", "loops", "keys", "self-BLEU", "cross-BLEU")
"""Figures from 0 to 1."""
_SHOWN = (
    *("seq-rep-1", "seq-rep-4", "different tokens", "loops", "entropy"),
    *("self-BLEU", "cross-BLEU", "keys"),
)
MODEL_ESTIMAND = (
    "teacher-forced: ppl exp(mean NLL), accuracy of the next token, rep/l the share of predictions "
    "among the l tokens before, wrep/l those of them that are wrong"
)


def print_decode_bench(benches: Sequence[DecodeBench], console: Console | None = None) -> None:
    """Print a block for the models, and one for each model and its decodings."""
    show([_model_table(benches), *map(_decoding_table, benches)], console)


def _model_table(benches: Sequence[DecodeBench]) -> RenderableType:
    columns = list(benches[0].model_block)
    table = _table("models, on real text", "model", columns)
    for bench in benches:
        table.add_row(plain(bench.model), *(_cell(bench.model_block, name) for name in columns))
    return Group(table, plain(MODEL_ESTIMAND, style="dim"), _interval(benches[0]), Text())


def _decoding_table(bench: DecodeBench) -> RenderableType:
    blocks = bench.decoding_block
    columns = [name for name in _SHOWN if any(name in block for block in blocks.values())]
    table = _table(f"decodings · {bench.model}", "decoding", columns)
    for name, block in blocks.items():
        table.add_row(
            plain(name, style="dim" if name == TEXT else ""),
            *(_cell(block, column) for column in columns),
        )
    return Group(table, plain(decoding_estimand(bench), style="dim"), _interval(bench), Text())


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=plain(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def decoding_estimand(bench: DecodeBench) -> str:
    """What the figures of continuations are, in words."""
    settings = bench.settings
    guard = "" if settings.guard == "none" else f", guard {settings.guard}"
    drawn = f" (where a decoding draws {settings.samples} each)" if settings.samples > 1 else ""
    return (
        f"continuations of {settings.new_tokens} tokens after {bench.prompts} prompts of "
        f"{settings.prompt_tokens}{drawn}{guard}; seq-rep-n: share of n-grams that stood before; "
        "loops: ends in three copies of the same; uniq-seq: different tokens of all together, and "
        "entropy theirs, in bits; self-BLEU: samples of one prompt, cross-BLEU: different prompts; "
        "keys: passkeys said"
    )


def _interval(bench: DecodeBench) -> Text:
    return Text(f"intervals over {bench.documents} documents: {INTERVALS}", style="dim")


def _cell(block: dict[str, Figure], name: str) -> Text:
    if name not in block:
        return Text("–")
    value, interval = written(name, block[name])
    text = Text(value)
    if interval:
        text.append(f"\n{interval}", style="dim")
    return text


def written(name: str, figure: Figure) -> tuple[str, str]:
    """A figure and its interval as tables have them; "" for an interval that is not there."""
    share = name.startswith(_SHARES)
    value = _number(figure.value, share)
    if math.isnan(figure.low):
        return value, ""
    return value, f"{_number(figure.low, share)}–{_number(figure.high, share)}"


def _number(value: float, share: bool) -> str:
    """Ends of a t interval may lie outside of what a share can be: they are cut."""
    if math.isnan(value):
        return "–"
    if share:
        return f"{min(max(0.0, value), 1.0):.3f}"
    value = max(0.0, value)
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
