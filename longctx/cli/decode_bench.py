"""The command that compares decodings: `longctx decode-bench`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..errors import RunError
from .device_options import DeviceOptions

__all__ = ["COMMAND", "DecodeBench"]


@dataclass(frozen=True, slots=True)
class DecodeBench:
    """Compare decodings by repetition, variety and keys.

    Two blocks: models on real text (perplexity, accuracy, rep/l, wrep/l), which no decoding
    changes; and each model under each decoding (seq-rep-n, loops, entropy, BLEU, keys), beside the
    text itself. The same command goes on where an interrupted one was.

    Examples:
        longctx decode-bench demo --decodings greedy dry sample:temperature=0.7 --out runs/decodings
        longctx decode-bench base tuned --decodings greedy contrastive --prompts 100 --out runs/both
        longctx decode-bench demo --decodings greedy chat --guard mend --keys 0 --out runs/guarded
    """

    models: Positional[tuple[str, ...]]
    """Checkpoint folders (their saved patches in place), hub ids, GGUF files, or "demo"."""
    decodings: tuple[str, ...]
    """NAME or NAME:field=value,…, or presets: see `longctx decodings`."""
    out: Path
    """Folder for tables, plot and continuations."""
    prompts: int = 50
    """Windows of real text to write on after, at most, spread over the documents."""
    prompt_tokens: int = 64
    """Tokens before each continuation."""
    new_tokens: int = 128
    """Tokens of each continuation; ends of text are passed over."""
    samples: int = 4
    """Continuations of each prompt where a decoding draws."""
    keys: int = 24
    """Passkey prompts that are answered too; 0 for none."""
    key_length: int = 256
    """Tokens of each of those."""
    guard: str = "none"
    """Against loops, for all decodings: "ban", "mend", or MODE:field=value,…."""
    text: tuple[str, ...] = ()
    """Files or folders, a document per file (default: the embedded held-out documents)."""
    seed: int = 0
    """Of what is drawn, and of the keys."""
    batch_size: int = 16
    """Prompts at a time."""
    overwrite: bool = False
    """Replace the tables that are there; continuations of the same settings are kept."""
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load each model, write on, print and write."""
        from longctx.eval.decoding.bench import BenchSettings, decode_bench
        from longctx.eval.reporting.decodings import (
            print_decode_bench,
            refuse_taken_bench,
            write_decode_bench,
        )

        from ..checkpoint import locate
        from ..folders import refuse_inside, refuse_other_than_folder
        from ..generation.registry import parse_decoding

        refuse_other_than_folder(self.out)
        refuse_taken_bench(self.out, self.overwrite)
        if self.batch_size < 1:
            raise RunError(f"--batch-size {self.batch_size}: expected 1 or more.")
        names = [Path(model).resolve().name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise RunError(
                f"models {', '.join(self.models) or '(none)'}: expected one or more, each of "
                "another name."
            )
        for decoding in self.decodings:
            parse_decoding(decoding)
        settings = BenchSettings(
            prompts=self.prompts,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            samples=self.samples,
            keys=self.keys,
            key_length=self.key_length,
            guard=self.guard,
            seed=self.seed,
            text=self.text,
        )
        for source in self.models:
            refuse_inside(self.out, locate(source))
        found = []
        for source, name in zip(self.models, names, strict=True):
            model, tokenizer = self.device_options.load(source)
            found.append(
                decode_bench(
                    model,
                    tokenizer,
                    self.decodings,
                    settings=settings,
                    folder=self.out / name,
                    name=name,
                    batch_size=self.batch_size,
                )
            )
        print_decode_bench(found)
        paths = write_decode_bench(found, self.out)
        print(f"{', '.join(path.name for path in paths)} are in {self.out}")
        return 0


COMMAND = DecodeBench
