"""A comparison of decodings as tables for the terminal: the models, and what they write."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..decoding.result import DECODING, MODEL, TEXT, BenchRow, DecodeBench, Figure, Metric
from .tables import number, plain, show

__all__ = ["bench_tables", "label_of", "print_decode_bench", "written", "written_interval"]


def print_decode_bench(result: DecodeBench, console: Console | None = None) -> None:
    """Print the block of the models and that of the decodings, with what they rest on."""
    show(bench_tables(result), console)


def bench_tables(result: DecodeBench) -> list[RenderableType]:
    """A table of the models by themselves, and one of what each writes; then notes."""
    by_themselves = _table(
        "models on real text, teacher-forced: no decoding changes these",
        [(_of_model(row), row) for row in result.of("model")],
        MODEL,
        about(result, "model"),
    )
    written_by = [
        _table(
            f"what {one.name} writes, by decoding",
            [(label_of(row), row) for row in result.of("decoding", one.name)],
            DECODING,
            about(result, "decoding", one.name),
        )
        for one in result.models
    ]
    return [by_themselves, *written_by, *(plain(note, style="yellow") for note in result.notes)]


def label_of(row: BenchRow) -> str:
    """What a row of the second block is called."""
    return "(the text itself)" if row.decoding == TEXT else row.decoding


def _of_model(row: BenchRow) -> str:
    return f"(the text, as {row.model} reads it)" if row.decoding == TEXT else row.model


def about(result: DecodeBench, block: str, model: str | None = None) -> list[str]:
    """Sentences under a table: over what it is taken, and what its columns are."""
    chosen, settings = result.of(block, model), result.settings
    sizes = [one for one in result.models if model in (None, one.name)]
    if block == "model":
        over = "; ".join(f"{one.name}: windows of {one.window_tokens:,} tokens" for one in sizes)
    else:
        one = sizes[0]
        over = (
            f"{one.prompts} prompts of {settings.prompt_tokens} tokens from {one.documents} "
            f"documents, {settings.new_tokens} new tokens each"
        )
        if one.key_tokens is not None:
            over += f"; {settings.keys} keys in prompts of {one.key_tokens:,} tokens"
        if any(row.figure("self_bleu") for row in chosen):
            over += (
                f"; self-BLEU of {settings.samples} continuations of each of "
                f"{min(settings.sampled_prompts, one.prompts)} prompts"
            )
    names = dict.fromkeys(
        f.interval for row in chosen for f in row.figures if not f.interval.startswith("none")
    )
    missing = dict.fromkeys(
        f.interval for row in chosen for f in row.figures if f.interval.startswith("none")
    )
    metrics = MODEL if block == "model" else DECODING
    shown = [m for m in metrics if any(row.figure(m.name) for row in chosen)]
    lines = [over, f"intervals: {'; '.join(names) or 'none'}"]
    if missing:
        lines.append(f"no interval{', '.join(name.removeprefix('none') for name in missing)}")
    return [*lines, "; ".join(f"{m.title}: {m.about}" for m in shown)]


def written(one: Figure | None, metric: Metric) -> str:
    """Write a figure: ".42" of a share as 0.42, other numbers to three digits."""
    if one is None or math.isnan(one.value):
        return "–"
    if metric.scale == "share":
        return f"{one.value:.3f}"
    return f"{one.value:.0f}" if metric.name == "uniq_seq" else number(one.value)


def written_interval(one: Figure | None, metric: Metric) -> str:
    """Write its interval, empty where there is none."""
    if one is None or math.isnan(one.low):
        return ""
    if metric.scale == "share":
        return f"{one.low:.2f}–{one.high:.2f}"
    if metric.name == "uniq_seq":
        return f"{one.low:.0f}–{one.high:.0f}"
    return f"{number(one.low)}–{number(one.high)}"


def _table(
    title: str,
    rows: Sequence[tuple[str, BenchRow]],
    metrics: Sequence[Metric],
    lines: Sequence[str],
) -> RenderableType:
    table = Table(
        title=plain(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    shown = [m for m in metrics if any(row.figure(m.name) for _, row in rows)]
    for metric in shown:
        table.add_column(metric.title, justify="right", no_wrap=True)
    for label, row in rows:
        cells: list[Text] = []
        for metric in shown:
            one = row.figure(metric.name)
            cell = Text(written(one, metric))
            if interval := written_interval(one, metric):
                cell.append(f"\n{interval}", style="dim")
            cells.append(cell)
        table.add_row(plain(label), *cells)
    return Group(table, *(plain(line, style="dim") for line in lines), Text())
