"""The command that says how to start an engine: `longctx serve-flags`."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from tyro.conf import Positional

from ..serving.engines import Engine

__all__ = ["COMMAND", "ServeFlags"]


@dataclass(frozen=True, slots=True)
class ServeFlags:
    """Print the command that serves a checkpoint with its own numbers.

    The command goes to stdout, notes to stderr. Exit code 1 if the engine cannot give the
    checkpoint's numbers. Reads config.json only.

    Examples:
        longctx serve-flags smollm2-16k --engine vllm
        longctx serve-flags demo-1k --engine llama.cpp
    """

    model: Positional[str]
    """Checkpoint folder, hub id, or "demo"."""
    engine: Engine
    """Which engine."""

    def run(self) -> int:
        """Read the config and print."""
        from ..checkpoint import locate
        from ..config_windows import impossible, text_part
        from ..errors import ModelError, printable
        from ..serving.flags import flags_of
        from ..weights import read_config

        source = locate(self.model)
        if str(source).endswith(".gguf"):
            raise ModelError(f"{source} is a GGUF file: name the checkpoint that it was made of.")
        config = read_config(source)
        if not config:
            raise ModelError(f"{source} has no config.json: expected a checkpoint.")
        for key, what, expected in impossible(text_part(config)):
            raise ModelError(f"{source}: config.json: {key}: {what}: expected {expected}.")
        flags = flags_of(source, config, self.engine)
        for note in flags.notes:
            print(f"{self.engine}: {printable(note)}", file=sys.stderr)
        if flags.commands:
            print(printable(flags.command))
        return 0 if flags.commands else 1


COMMAND = ServeFlags
