"""A choice of a method as a table for the terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from longctx.files import finite, write_whole

from ..choice.choose import Choice, Finalist
from ..comparison.differences import Difference
from .files import write_sweep
from .tables import change, plain, show

__all__ = ["print_choice", "write_choice"]


def print_choice(choice: Choice, console: Console | None = None) -> None:
    """Print what was compared, what was dropped, and the recommendation."""
    asked = choice.finalists[0].asked
    table = Table(
        title=plain(f"{choice.model} to {choice.target:,} tokens", style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("candidate", overflow="fold")
    for name in (f"keys/{asked}", "vs best", "perplexity", "time", "plain"):
        table.add_column(name, justify="right", no_wrap=True)
    came = next(one for one in choice.finalists if one.label == "none")
    for one in choice.finalists:
        table.add_row(
            plain(one.label, style="bold" if one.label == choice.recommended else ""),
            _keys(one),
            _difference(one.behind, share=True, missing="best"),
            _difference(one.perplexity, share=False, missing="–"),
            f"×{one.seconds / came.seconds:.2f}" if came.seconds else "–",
            "yes" if one.plain else "no",
        )
    lengths = " and ".join(f"{n:,}" for n in choice.keys.lengths if n > choice.window)
    said = (
        f"keys: at {lengths} tokens, beyond the old window of {choice.window:,}, with Wilson's 95% "
        "interval; vs best: share found minus that of the best, on the same prompts, t over "
        f"haystacks, 95%; perplexity: change of that at {choice.window:,} tokens, t over "
        "documents, 95%; time: of these prompts as they were measured here; plain: whether plain "
        "transformers loads it"
    )
    lines = [plain(f"dropped: {name}: {why}", style="dim") for name, why in choice.dropped.items()]
    verdict = plain(f"{choice.recommended}: {choice.reason}", style="bold")
    show([table, plain(said, style="dim"), *lines, Text(), verdict], console)


def _keys(one: Finalist) -> Text:
    text = Text(str(one.found))
    if not math.isnan(one.low):
        text.append(f"\n{100 * one.low:.0f}–{100 * one.high:.0f}%", style="dim")
    return text


def _difference(one: Difference | None, *, share: bool, missing: str) -> Text:
    if one is None:
        return Text(missing)
    text = Text(change(one.value, share=share))
    if not math.isnan(one.low):
        low, high = change(one.low, share=share), change(one.high, share=share)
        text.append(f"\n{low.removesuffix(' pts')} to {high}", style="dim")
    return text


def write_choice(choice: Choice, folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Write choice.json, and the comparison as `longctx report` and `compare` read it.

    Raises:
        RunError: files of something else, or a report without `overwrite`, are there.
        OSError: the disk refuses.
    """
    content: Any = {
        "model": choice.model,
        "window": choice.window,
        "target": choice.target,
        "recommended": choice.recommended,
        "reason": choice.reason,
        "finalists": [dataclasses.asdict(one) for one in choice.finalists],
        "dropped": dict(choice.dropped),
    }
    text = json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n"
    return [
        *write_sweep(choice.keys, folder / "keys", overwrite=overwrite),
        *write_sweep(choice.inside, folder / "inside", overwrite=overwrite),
        write_whole(folder / "choice.json", lambda part: part.write_text(text, encoding="utf-8")),
    ]
