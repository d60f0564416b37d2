"""The command that reads in pieces: `longctx read`."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..errors import RunError, printable
from .device_options import DeviceOptions

__all__ = ["COMMAND", "Read"]


@dataclass(frozen=True, slots=True)
class Read:
    """Ask a document of any length, or sum it up, a piece at a time.

    Prints the answer, and on stderr the place in the document that it comes from.

    Examples:
        longctx read smollm2 --document manual.txt --question "What does zlib.crc32 return?"
        longctx read smollm2 --document manual.txt --summarise --chunk 2000
        longctx read smollm2 --document manual.txt --question "Who wrote it?" --combine nbce --json
    """

    model: Positional[str]
    """Checkpoint folder (its saved patch in place), hub id, GGUF file, or "demo"."""
    document: Path
    """A file of UTF-8 text."""
    question: str | None = None
    """What is asked."""
    summarise: bool = False
    """Sum the document up instead."""
    combine: Literal["map", "nbce", "windows"] = "map"
    """map: every piece answers, and the surest is taken. nbce: all answer together, token by token.
    windows: pieces side by side, at the same positions."""
    chunk: int | None = None
    """Tokens of a piece, at most (default: what the window leaves)."""
    overlap: int | None = None
    """Tokens that neighbouring pieces share; more than what is sought has (default: a quarter of
    the chunk, at most 256)."""
    max_new_tokens: int = 64
    """Tokens of an answer or a summary, at most."""
    batch_size: int = 8
    """Pieces read at a time."""
    intro: str = ""
    """Stands before each piece."""
    answer_prefix: str | None = None
    """Begins the answer (default: "Answer:" for a model without a chat template)."""
    method: str = "none"
    """Extend the model first: NAME:FACTOR or NAME:field=value,…, with a "+" between several that go
    on top of each other. See `longctx methods`."""
    replace: bool = False
    """Let the method replace the RoPE scaling that the checkpoint ships with."""
    json: bool = False
    """Print the whole answer as JSON: text, place, and what each piece says."""
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load, read, print."""
        from longctx.eval.running.progress import Progress

        from ..core import extend_all
        from ..files import finite, read_text
        from ..reading.read import Reading, read
        from ..reading.summarise import summarise
        from ..registry import parse_methods

        if self.summarise == (self.question is not None):
            raise RunError('pass --question "…" or --summarise, and not both.')
        if self.summarise and (self.combine, self.overlap, self.intro, self.answer_prefix) != (
            "map", None, "", None,
        ):  # fmt: skip
            raise RunError(
                "--combine, --overlap, --intro and --answer-prefix are for a --question: leave "
                "them out."
            )
        Reading(self.combine, self.chunk, self.overlap, self.batch_size)
        methods = parse_methods(self.method)
        document = read_text(self.document, "a document")
        model, tokenizer = self.device_options.load(self.model)
        extend_all(model, methods, replace=self.replace)
        with Progress(1.0, shown=True) as bar:
            share = 0.0
            bar.at("cutting the document into pieces")

            def show(done: int, there: int) -> None:
                nonlocal share
                bar.at(f"piece {done} of {there}")
                bar.advance(max(0.0, done / there - share))
                share = max(share, done / there)

            if self.question is None:
                found = summarise(
                    model,
                    tokenizer,
                    document,
                    chunk=self.chunk,
                    max_new_tokens=self.max_new_tokens,
                    batch_size=self.batch_size,
                    progress=show,
                )
            else:
                found = read(
                    model,
                    tokenizer,
                    document,
                    self.question,
                    combine=self.combine,
                    chunk=self.chunk,
                    overlap=self.overlap,
                    max_new_tokens=self.max_new_tokens,
                    batch_size=self.batch_size,
                    intro=self.intro,
                    answer_prefix=self.answer_prefix,
                    progress=show,
                )
        if self.json:
            print(json.dumps(finite(dataclasses.asdict(found)), ensure_ascii=True))
            return 0
        print(printable(found.text))
        place = getattr(found, "place", None)
        if place is not None:
            about = document[slice(*place)]
            shown = about if len(about) <= 120 else f"{about[:120]}…"
            print(
                f"characters {place[0]:,} to {place[1]:,} of {self.document}: {printable(shown)}",
                file=sys.stderr,
            )
        return 0


COMMAND = Read
