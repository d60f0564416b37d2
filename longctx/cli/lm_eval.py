"""The command that runs lm-evaluation-harness on a patched model: `longctx lm-eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .device_options import DeviceOptions

__all__ = ["COMMAND", "LmEval"]


@dataclass(frozen=True, slots=True)
class LmEval:
    """Run lm-evaluation-harness under several methods and lengths.

    Among its tasks are RULER's. Needs `pip install 'longctx-toolkit[lm-eval]'`. With --out,
    scores are kept as they come in OUT/lm_eval.jsonl, the same command goes on where an interrupted
    one was, and OUT (which may be that of a sweep) gets the table as CSV, JSON and parquet.

    Examples:
        longctx lm-eval smollm2 --tasks niah_single_1 --lengths 4096 8192 --limit 50
        longctx lm-eval smollm2 --tasks ruler --lengths 8k --methods none yarn:2 --out runs/yarn
        longctx lm-eval demo --tasks mine --include-path tasks/ --lengths 256
    """

    model: Positional[str]
    """Checkpoint folder (its saved patch in place), hub id, GGUF file, or "demo"."""
    tasks: tuple[str, ...]
    """Names of tasks or groups, as the harness knows them."""
    lengths: tuple[str, ...]
    """Tokens: 4096, 4k, or FROM:TO, which doubles."""
    methods: tuple[str, ...] = ("none",)
    """NAME:FACTOR or NAME:field=value,…, with a "+" between several that go on top of each other,
    and "none" for the model as it comes."""
    limit: int | None = None
    """Documents per task and length; default: all."""
    batch_size: int = 1
    """Prompts at a time."""
    chat: bool = False
    """Put prompts into the tokenizer's chat template."""
    include_path: Path | None = None
    """Folder of further tasks, in the harness's YAML."""
    out: Path | None = None
    """Folder for the results; default: they are printed only."""
    replace: bool = False
    """Let methods replace the RoPE scaling that the checkpoint ships with."""
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load, evaluate, print and write."""
        from rich.console import Console
        from rich.table import Table

        from longctx.eval import parse_lengths
        from longctx.eval.lm_eval import run_lm_eval
        from longctx.eval.reporting.tables import plain

        from ..checkpoint import locate
        from ..folders import refuse_inside, refuse_other_than_folder
        from ..registry import parse_methods

        if self.out is not None:
            refuse_other_than_folder(self.out)
        for method in self.methods:
            parse_methods(method)
        lengths = parse_lengths(",".join(self.lengths))
        if self.out is not None:
            refuse_inside(self.out, locate(self.model))
        model, tokenizer = self.device_options.load(self.model)
        frame = run_lm_eval(
            model,
            tokenizer,
            self.tasks,
            lengths,
            methods=self.methods,
            limit=self.limit,
            batch_size=self.batch_size,
            chat=self.chat,
            include_path=self.include_path,
            out=self.out,
            replace=self.replace,
        )
        table = Table(*map(str, frame.columns), box=None, padding=(0, 2, 0, 0))
        for row in frame.itertuples(index=False):
            table.add_row(*(f"{x:.4g}" if isinstance(x, float) else plain(x) for x in row))
        Console().print(table)
        if self.out is not None:
            print(f"lm_eval.csv, .parquet and .json are in {self.out}")
        return 0


COMMAND = LmEval
