"""The command that copies and converts: `longctx convert`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from .device_options import DeviceOptions

if TYPE_CHECKING:
    from ..prompts.haystacks import Texts

__all__ = ["COMMAND", "Convert"]


@dataclass(frozen=True, slots=True)
class Convert:
    """Write a checkpoint as a folder, or make one of other weights.

    From a GGUF file, a hub id, a folder or the embedded model.

    Examples:
        longctx convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2
        longctx convert demo tiny
        longctx convert demo tiny-mqa --to multi_query:1
        longctx convert smollm2 smollm2-8x --to moe:experts=8,active=2
        longctx convert smollm2 smollm2-sw --to sliding_window:512,keep=auto:10
        longctx convert demo tiny-linear --to linear_attention:window=64,keep=auto:2
    """

    source: Positional[str]
    """GGUF file, checkpoint folder, hub id, or "demo"."""
    out: Positional[Path]
    """Folder to write; it must not exist yet, unless --overwrite."""
    to: str | None = None
    """NAME:field=value,…: a method that makes a new model (`longctx methods`)."""
    calibration: tuple[Path, ...] = ()
    """Text files that such a method reads; default: parts of Python's manual."""
    overwrite: bool = False
    """Replace what is there, once the new checkpoint is complete."""
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load, convert, save."""
        from ..checkpoint import locate, save
        from ..converting import convert
        from ..folders import refuse_taken
        from ..registry import parse_conversion

        method = None if self.to is None else parse_conversion(self.to)
        texts = self._texts()
        refuse_taken(self.out, self.overwrite, inputs=[locate(self.source)])
        model, tokenizer = self.device_options.load(self.source)
        if method is not None:
            _show_progress()
            made = convert(model, method, tokenizer=tokenizer, calibration=texts)
            print(made.report())
            model = made.model
        print(save(model, tokenizer, self.out, overwrite=self.overwrite).message)
        return 0

    def _texts(self) -> Texts | None:
        """The calibration text, None for the house's.

        Raises:
            RunError: a file that cannot be read, or nothing that would read it.
        """
        from ..errors import RunError
        from ..prompts.haystacks import Texts

        if not self.calibration:
            return None
        if self.to is None:
            raise RunError("--calibration is for --to: pass a method, or leave it out.")
        try:
            documents = tuple(_text_of(path) for path in self.calibration)
        except OSError as error:
            raise RunError(f"--calibration: {error}. Expected text files in UTF-8.") from error
        return Texts(documents, name="calibration")


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        from ..errors import RunError

        raise RunError(f"--calibration {path}: {error}. Expected a text file in UTF-8.") from error


def _show_progress() -> None:
    """Let conversions say on stderr how far they are."""
    import logging

    log = logging.getLogger("longctx.patches")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(logging.StreamHandler())


COMMAND = Convert
