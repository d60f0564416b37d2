"""The command that answers over HTTP: `longctx serve`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from ..errors import RunError
from .device_options import DeviceOptions

__all__ = ["COMMAND", "Serve"]


@dataclass(frozen=True, slots=True)
class Serve:
    """Answer OpenAI's API over HTTP, with any method in place.

    Needs `pip install 'longctx-toolkit[serve]'`. SIGINT and SIGTERM stop it. For methods that
    change frequencies alone, vLLM serves the saved checkpoint faster.

    Examples:
        longctx serve demo --method dual_chunk:factor=4,log_n=True
        longctx serve smollm2-16k --port 8080
        longctx serve smollm2 --method self_extend --name smollm2-far --parallel 2
    """

    model: Positional[str]
    """Checkpoint folder (its saved patch in place), hub id, GGUF file, or "demo"."""
    method: str = "none"
    """Extend the model first: NAME:FACTOR or NAME:field=value,…, with a "+" between several that go
    on top of each other. See `longctx methods`."""
    replace: bool = False
    """Let the method replace the RoPE scaling that the checkpoint ships with."""
    host: str = "127.0.0.1"
    """Address to listen at; any other than this machine's own lets others in, and there is no
    key."""
    port: int = 8000
    """Port to listen at; 0 takes any that is free."""
    name: str | None = None
    """What requests call the model (default: MODEL)."""
    parallel: int = 4
    """Requests that are answered at once, a token of each in turn; others wait."""
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Bind, load, extend, answer."""
        from ..core import extend_all
        from ..registry import parse_methods

        try:
            from ..serving.server import bound_socket, serve
        except ModuleNotFoundError as error:
            if error.name not in ("starlette", "uvicorn"):
                raise
            raise RunError(
                f"longctx serve needs {error.name}: pip install 'longctx-toolkit[serve]'."
            ) from error
        if self.parallel < 1:
            raise RunError(f"--parallel {self.parallel}: expected 1 or more.")
        methods = parse_methods(self.method)
        with bound_socket(self.host, self.port) as place:  # before the model takes its time to load
            print(f"longctx serve: loading {self.model}", file=sys.stderr, flush=True)
            model, tokenizer = self.device_options.load(self.model)
            for patch in extend_all(model, methods, replace=self.replace):
                print(patch.report(), file=sys.stderr)
            name = self.name or self.model
            ended = serve(model, tokenizer, name, place, parallel=self.parallel)
        if not ended:
            os._exit(0)  # an orderly end would wait for the forward pass, or crash in it
        return 0


COMMAND = Serve
