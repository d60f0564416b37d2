"""The command that compares decodings: `longctx decode-bench`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from longctx.eval.decoding.settings import BenchSettings

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
    settings: Annotated[BenchSettings, arg(name="")] = field(default_factory=BenchSettings)
    batch_size: int = 16
    """Prompts at a time."""
    overwrite: bool = False
    """Replace the tables that are there; continuations of the same settings are kept."""
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load each model, write on, print and write."""
        from longctx.eval.decoding.bench import decode_bench
        from longctx.eval.reporting.decoding_files import refuse_taken_bench, write_decode_bench
        from longctx.eval.reporting.decoding_tables import print_decode_bench

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
                    settings=self.settings,
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
