"""Samples as the trainer sees them, with what is learnt in colour.

    inspect_samples(prepare("chats.json", tokenizer).dataset, tokenizer, count=3)

What the model learns to write is bold green and stands in ⟦ ⟧, which tells it apart where there are
no colours; special tokens and control characters are spelt out. Long stretches are shortened in the
middle, and say by how much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby, islice
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from longctx.errors import printable
from longctx.prompts.haystacks import decode

from .tokenize import IGNORED

__all__ = ["inspect_samples"]


def inspect_samples(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 3,
    stretch: int = 400,
    console: Console | None = None,
) -> None:
    """Print the first samples.

    Args:
        rows: with input_ids and labels; "record" is named where it is there.
        tokenizer: what the ids were made with.
        count: how many samples.
        stretch: most characters of each stretch that is learnt, or is not; 0 shows all.
        console: where to; standard output if None.
    """
    console = console or Console(highlight=False)
    for number, row in enumerate(islice(rows, count), 1):
        ids = [int(token) for token in row["input_ids"]]
        learnt = [int(label) != IGNORED for label in row["labels"]]
        title = f"sample {number}"
        if "record" in row:
            title += f" · record {int(row['record']):,}"
        share = sum(learnt) / max(len(ids), 1)
        title += f" · {len(ids):,} tokens, {sum(learnt):,} supervised ({share:.0%})"
        console.print(Rule(Text(title), align="left", style="dim"))
        console.print(_sample(tokenizer, ids, learnt, stretch), soft_wrap=True)


def _sample(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], learnt: list[bool], stretch: int
) -> Text:
    text = Text()
    pairs = zip(ids, learnt, strict=True)
    for supervised, group in groupby(pairs, key=lambda pair: pair[1]):
        tokens = tuple(token for token, _ in group)
        written = _shortened(printable(decode(tokenizer, tokens)), stretch)
        if supervised:
            text.append("⟦", style="green")
            text.append(written, style="bold green")
            text.append("⟧", style="green")
        else:
            text.append(written, style="dim")
    return text


def _shortened(text: str, most: int) -> str:
    if not most or len(text) <= most + 40:  # the note on what is missing takes room too
        return text
    half = most // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"
