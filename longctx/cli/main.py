"""The `longctx` command: the same dataclasses that the Python API takes, read from the shell."""

from __future__ import annotations

import inspect
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg, subcommand

from ..errors import LongctxError
from .compare import Compare
from .demo import Demo
from .device_options import DeviceOptions
from .inspect import Inspect
from .lm_eval import LmEval
from .plan import Plan
from .report import Report
from .sweep import Sweep
from .train import Train

__all__ = ["main"]

FINE, PROBLEM, USAGE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Methods:
    """List the methods: what each does, and the fields it takes.

    Example:
        longctx methods
    """

    def run(self) -> int:
        """Print the table."""
        import dataclasses
        import importlib

        from rich.console import Console
        from rich.table import Table

        from ..registry import available

        table = Table("method", "what it does", "fields", box=None, padding=(0, 2, 0, 0))
        for name in available():
            module = importlib.import_module(f"longctx.patches.{name}")
            first = str(module.__doc__).splitlines()[0].rstrip(".")
            fields = ", ".join(field.name for field in dataclasses.fields(module.METHOD))
            table.add_row(name, first, fields)
        Console().print(table)
        return FINE


@dataclass(frozen=True, slots=True)
class Convert:
    """Write a GGUF file, a hub id or the embedded model as a plain checkpoint folder.

    Examples:
        longctx convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2
        longctx convert demo tiny
    """

    source: Positional[str]
    """GGUF file, checkpoint folder, hub id, or "demo"."""
    out: Positional[Path]
    """Folder to write; it must not exist yet, unless --overwrite."""
    overwrite: bool = False
    """Replace what is there, once the new checkpoint is complete."""
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load and save."""
        from ..checkpoint import save
        from ..folders import refuse_taken

        refuse_taken(self.out, self.overwrite)
        model, tokenizer = self.device_options.load(self.source)
        print(save(model, tokenizer, self.out, overwrite=self.overwrite).message)
        return FINE


@dataclass(frozen=True, slots=True)
class Extend:
    """Extend a model's window and save it as a checkpoint, with proof of effect.

    Examples:
        longctx extend demo tiny-yarn --method yarn:4
        longctx extend smollm2 smollm2-16k --method yarn:target=16384
        longctx extend meta-llama/Llama-3.1-8B out --method yarn:32 --replace
    """

    model: Positional[str]
    """Checkpoint folder, hub id, GGUF file, or "demo"."""
    out: Positional[Path]
    """Folder to write; it must not exist yet, unless --overwrite."""
    method: str
    """NAME:FACTOR or NAME:field=value,…: see `longctx methods`."""
    replace: bool = False
    """Replace the RoPE scaling that the checkpoint ships with."""
    overwrite: bool = False
    """Replace the folder, once the new checkpoint is complete."""
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load, extend, report, save."""
        from ..checkpoint import save
        from ..core import extend
        from ..errors import MethodError
        from ..folders import refuse_taken
        from ..registry import parse_method

        method = parse_method(self.method)
        if method is None:
            raise MethodError("'none' extends nothing; `longctx convert` copies a checkpoint.")
        refuse_taken(self.out, self.overwrite)
        model, tokenizer = self.device_options.load(self.model)
        print(extend(model, method, replace=self.replace).report())
        print(save(model, tokenizer, self.out, overwrite=self.overwrite).message)
        return FINE


@dataclass(frozen=True, slots=True)
class Doctor:
    """Find settings in a checkpoint that fail silently on long inputs; exit 1 if there are any.

    Reads its JSON files only: no weights, no code.

    Examples:
        longctx doctor smollm2-16k
        longctx doctor demo
    """

    model: Positional[str]
    """Checkpoint folder, or "demo"."""

    def run(self) -> int:
        """Print the findings."""
        from rich.console import Console

        from ..checkpoint import local_folder
        from ..doctor import examine

        console = Console(highlight=False, soft_wrap=True)
        findings = examine(local_folder(self.model))
        for finding in findings:
            colour = "red" if finding.level == "problem" else "yellow"
            console.print(f"[{colour}]{finding.level}[/] {finding.where}: {finding.what}")
            console.print(f"        → {finding.mend}")
        problems = sum(finding.level == "problem" for finding in findings)
        console.print(f"{problems} problems, {len(findings) - problems} notes in {self.model}")
        return PROBLEM if problems else FINE


def _text(command: type) -> str:
    """The whole docstring: tyro would drop its examples."""
    return inspect.cleandoc(command.__doc__ or "")


Command = (
    Annotated[Methods, subcommand("methods", description=_text(Methods))]
    | Annotated[Convert, subcommand("convert", description=_text(Convert))]
    | Annotated[Extend, subcommand("extend", description=_text(Extend))]
    | Annotated[Sweep, subcommand("sweep", description=_text(Sweep))]
    | Annotated[Train, subcommand("train", description=_text(Train))]
    | Annotated[Inspect, subcommand("inspect", description=_text(Inspect))]
    | Annotated[Plan, subcommand("plan", description=_text(Plan))]
    | Annotated[Compare, subcommand("compare", description=_text(Compare))]
    | Annotated[Report, subcommand("report", description=_text(Report))]
    | Annotated[LmEval, subcommand("lm-eval", description=_text(LmEval))]
    | Annotated[Doctor, subcommand("doctor", description=_text(Doctor))]
    | Annotated[Demo, subcommand("demo", description=_text(Demo))]
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 fine, 1 found a problem, 2 bad usage."""
    try:
        command: Command = tyro.cli(Command, prog="longctx", args=argv, description=__doc__)
        return command.run()
    except LongctxError as error:
        print(f"longctx: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("longctx: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe went away: not our failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
