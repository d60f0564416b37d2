"""The command that extends: `longctx extend`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .device_options import DeviceOptions

__all__ = ["COMMAND", "Extend"]


@dataclass(frozen=True, slots=True)
class Extend:
    """Extend a model's window and save it, with proof of effect.

    Examples:
        longctx extend demo tiny-yarn --method yarn:4
        longctx extend smollm2 smollm2-16k --method yarn:target=16384
        longctx extend demo demo-2k --method yarn:2+dual_chunk:factor=4,log_n=True
        longctx extend demo demo-found --method longrope:@runs/search/longrope.json
        longctx extend meta-llama/Llama-3.1-8B out --method yarn:32 --replace
        longctx extend smollm2 smollm2-dca --method dual_chunk:factor=4,log_n=True --remote-code
    """

    model: Positional[str]
    """Checkpoint folder, hub id, GGUF file, or "demo"."""
    out: Positional[Path]
    """Folder to write; it must not exist yet, unless --overwrite."""
    method: str
    """NAME:FACTOR, NAME:field=value,… or NAME:@FILE (fields that `longctx search` found), with a
    "+" between several that go on top of each other. See `longctx methods`."""
    replace: bool = False
    """Replace the RoPE scaling that the checkpoint ships with."""
    overwrite: bool = False
    """Replace the folder, once the new checkpoint is complete."""
    remote_code: bool = False
    """Write a module beside it, by which transformers loads it with the method in place where
    longctx is installed (trust_remote_code=True); for methods that no config can say."""
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load, extend, report, save."""
        from ..checkpoint import locate, save
        from ..core import extend_all
        from ..errors import MethodError
        from ..folders import refuse_taken
        from ..registry import parse_methods

        methods = parse_methods(self.method)
        if not methods:
            raise MethodError("'none' extends nothing; `longctx convert` copies a checkpoint.")
        refuse_taken(self.out, self.overwrite, inputs=[locate(self.model)])
        model, tokenizer = self.device_options.load(self.model)
        for patch in extend_all(model, methods, replace=self.replace):
            print(patch.report())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the message says it too
            saved = save(
                model, tokenizer, self.out, overwrite=self.overwrite, remote_code=self.remote_code
            )
        print(saved)
        return 0


COMMAND = Extend
