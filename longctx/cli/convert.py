"""The command that copies: `longctx convert`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .device_options import DeviceOptions

__all__ = ["COMMAND", "Convert"]


@dataclass(frozen=True, slots=True)
class Convert:
    """Write a GGUF file, a hub id or the embedded model as a checkpoint.

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
        from ..checkpoint import locate, save
        from ..folders import refuse_taken

        refuse_taken(self.out, self.overwrite, inputs=[locate(self.source)])
        model, tokenizer = self.device_options.load(self.source)
        print(save(model, tokenizer, self.out, overwrite=self.overwrite).message)
        return 0


COMMAND = Convert
