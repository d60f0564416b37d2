"""The command that writes GGUF: `longctx export-gguf`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from .device_options import DeviceOptions

__all__ = ["COMMAND", "ExportGguf"]


@dataclass(frozen=True, slots=True)
class ExportGguf:
    """Write a checkpoint as GGUF for llama.cpp, frequencies included.

    The file is read back and compared. What llama.cpp cannot compute is refused. The weights are
    held in float32 meanwhile: 4 bytes of memory for each parameter.

    Examples:
        longctx export-gguf demo-1k demo-1k.gguf
        longctx export-gguf smollm2-16k smollm2-16k.gguf --dtype q8_0
    """

    model: Positional[str]
    """Checkpoint folder, hub id, or "demo"."""
    out: Positional[Path]
    """The file to write; it must not exist yet, unless --overwrite."""
    dtype: Literal["f32", "f16", "q8_0"] = "f16"
    """Of the weight matrices; norms, biases and frequencies are float32."""
    overwrite: bool = False
    """Replace the file, once the new one is complete."""

    def run(self) -> int:
        """Load, write, compare."""
        from ..checkpoint import locate
        from ..errors import RunError
        from ..folders import refuse_taken_file
        from ..serving.gguf_export import export_gguf

        if self.out.suffix != ".gguf":
            raise RunError(f"{self.out}: expected a name that ends with .gguf.")
        refuse_taken_file(self.out, self.overwrite, inputs=[locate(self.model)])
        model, tokenizer = DeviceOptions(device="cpu", dtype="float32").load(self.model)
        print(export_gguf(model, tokenizer, self.out, dtype=self.dtype))
        return 0


COMMAND = ExportGguf
