"""The command that writes on after prompts: `longctx generate`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ..catalogue import entries
from ..errors import RunError, printable
from .device_options import DeviceOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..generation.generate import Generated

__all__ = ["COMMAND", "Generate"]


def _which(default: str) -> str:
    """What the help says after the decoding's description."""
    names = ", ".join(entry.name for entry in entries("longctx.generation.decodings", "DECODING"))
    return f"(default: {default}; there are {names})"


@dataclass(frozen=True, slots=True)
class Generate:
    """Write on after prompts, with a decoding and a guard against loops.

    With --out rows are written as they come: the same command goes on where an interrupted one
    was. Control characters that a model writes are spelt out on the terminal, not in the file.

    Examples:
        longctx generate demo --prompt "The parser" --decoding dry --guard mend --stream
        longctx generate smollm2 --prompt "Why is the sky blue?" --chat --decoding chat
        longctx generate smollm2 --file prompts.jsonl --decoding retrieval --out said.jsonl
        longctx generate demo --file prompts.txt --method yarn:4 --decoding contrastive:k=8
    """

    model: Positional[str]
    """Checkpoint folder (its saved patch in place), hub id, GGUF file, or "demo"."""
    prompt: tuple[str, ...] = ()
    """Texts to go on from."""
    file: Path | None = None
    """A file of prompts: .jsonl (a text, messages or ids a line), else a line of text each."""
    chat: bool = False
    """Put each --prompt as a user's message into the model's chat template."""
    decoding: Annotated[str, arg(help_behavior_hint=_which)] = "greedy"
    """NAME or NAME:field=value,…, or a preset (translation, chat, retrieval): see
    `longctx decodings`."""
    guard: str = "none"
    """Against loops: "ban", "mend", or MODE:field=value,… such as mend:copies=3."""
    max_new_tokens: int | None = None
    """Tokens to write after each prompt, at most (default: 256, or what the window leaves beside
    the longest prompt)."""
    method: str = "none"
    """Extend the model first: NAME:FACTOR or NAME:field=value,…, with a "+" between several that go
    on top of each other. See `longctx methods`."""
    replace: bool = False
    """Let the method replace the RoPE scaling that the checkpoint ships with."""
    batch_size: int = 8
    """Prompts at a time."""
    seed: int = 0
    """Of whatever is drawn."""
    ignore_eos: bool = False
    """Go on after a token that ends the text."""
    stream: bool = False
    """Print text as it comes; several prompts take turns, one at a time."""
    out: Path | None = None
    """File to write, as JSON lines: text, token ids, why a row ended, what the guard did."""
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load, generate, print or write."""
        from ..core import extend_all
        from ..folders import refuse_inputs, refuse_inside, refuse_other_than_file
        from ..generation.loop_guard import parse_guard
        from ..generation.registry import parse_decoding
        from ..generation.requests import new_tokens_of, prompt_ids, refuse_beyond_window
        from ..registry import parse_methods

        parse_decoding(self.decoding)
        parse_guard(self.guard)
        methods = parse_methods(self.method)
        for option in ("max_new_tokens", "batch_size"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise RunError(f"--{option.replace('_', '-')} {value}: expected 1 or more.")
        if self.stream and self.out is not None:
            raise RunError("--stream prints text as it comes and --out writes it: leave one out.")
        prompts = self.prompts()
        if self.out is not None:
            from ..checkpoint import locate

            refuse_other_than_file(self.out)
            refuse_inputs(self.out, [] if self.file is None else [self.file])
            refuse_inside(self.out, locate(self.model))
        model, tokenizer = self.device_options.load(self.model)
        extend_all(model, methods, replace=self.replace)
        # All prompts are known to fit before any is gone on from, and no row depends on its batch.
        table: Any = model.get_input_embeddings()
        ids = prompt_ids(tokenizer, prompts, int(table.weight.shape[0]))
        limit = new_tokens_of(model, ids, self.max_new_tokens)
        refuse_beyond_window(model, ids, limit)
        asked = _Asked(model, tokenizer, ids, limit)
        if self.out is None:
            self._print(asked)
        else:
            self._write(asked, self.out)
        return 0

    def prompts(self) -> list[Any]:
        """The prompts, from options or the file.

        Raises:
            RunError: none, or both.
            DataError: a file that cannot be read as prompts.
        """
        from ..generation.prompt_files import read_prompts

        if bool(self.prompt) == (self.file is not None):
            raise RunError('pass --prompt "…" or --file prompts.txt, and not both.')
        if self.file is not None:
            if self.chat:
                raise RunError("--chat is for --prompt: write messages into a .jsonl --file.")
            return read_prompts(self.file)
        if self.chat:
            return [[{"role": "user", "content": text}] for text in self.prompt]
        return [*self.prompt]

    def _generate(self, asked: _Asked, first: int, size: int, shown: Any = None) -> Generated:
        """Go on after `size` prompts, from number `first` on."""
        from ..generation.generate import generate
        from ..generation.loop_guard import parse_guard

        return generate(
            asked.model,
            asked.tokenizer,
            asked.ids[first : first + size],
            decoding=self.decoding,
            guard=parse_guard(self.guard),
            max_new_tokens=asked.limit,
            batch_size=self.batch_size,
            seed=self.seed,
            stream=shown,
            ignore_eos=self.ignore_eos,
            first_row=first,
        )

    def _print(self, asked: _Asked) -> None:
        from longctx.eval.running.progress import Progress

        several = len(asked.ids) > 1
        size = 1 if self.stream else self.batch_size

        def show(row: int, text: str) -> None:
            del row
            print(printable(text), end="", flush=True)

        for first in range(0, len(asked.ids), size):
            if self.stream:
                if several:
                    print(f"[{first}] ", end="")
                said = self._generate(asked, first, size, show)
                print()
            else:
                # A bar of its own for each batch: texts are printed between them.
                with Progress(len(asked.ids), shown=True) as progress:
                    progress.advance(first)
                    progress.at(f"row {first} of {len(asked.ids)}")
                    said = self._generate(asked, first, size)
                for index, text in enumerate(said.texts, first):
                    print(f"{f'[{index}] ' if several else ''}{printable(text)}", flush=True)
            for event in said.events:
                where = f"row {first + event.row}, token {event.position}"
                print(f"{where}: {event.kind}: {event.detail}", file=sys.stderr)

    def _write(self, asked: _Asked, out: Path) -> None:
        from longctx.eval.running.progress import Progress

        from ..fingerprint import identity_of, json_digest
        from ..generation.loop_guard import parse_guard
        from ..generation.registry import parse_decoding
        from ..generation.row_file import RowFile

        settings: dict[str, Any] = {
            "decoding": str(parse_decoding(self.decoding)),
            "guard": str(parse_guard(self.guard)),
            "method": self.method,
            "max_new_tokens": asked.limit,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            **identity_of(asked.model, asked.tokenizer),
        }
        digests = [json_digest(each) for each in asked.ids]
        count = len(asked.ids)
        with RowFile(out, settings, digests) as rows, Progress(count, shown=True) as progress:
            before = rows.done
            progress.advance(before)
            for first in range(before, count, self.batch_size):
                progress.at(f"row {first} of {count}")
                said = self._generate(asked, first, self.batch_size)
                for index, text in enumerate(said.texts):
                    rows.add(_row(said, index, text))
                progress.advance(len(said.texts))
        kept = f", {before} of them from before" if before else ""
        print(f"{count} rows are in {out}{kept}")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is gone on from, and how far."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: list[tuple[int, ...]]
    limit: int
    """New tokens at most."""


def _row(said: Generated, index: int, text: str) -> dict[str, Any]:
    events = [dataclasses.asdict(event) for event in said.events if event.row == index]
    for event in events:
        del event["row"]
    return {
        "text": text,
        "finish_reason": said.finish_reasons[index],
        "token_ids": said.token_ids[index],
        "events": events,
    }


COMMAND = Generate
