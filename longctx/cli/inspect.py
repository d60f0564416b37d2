"""The command that shows data: `longctx inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

__all__ = ["COMMAND", "Inspect"]


@dataclass(frozen=True, slots=True)
class Inspect:
    """Show samples as the trainer sees them, and an account of all.

    What is learnt is in colour.

    Examples:
        longctx inspect sample demo --template vicuna --max-length 2048
        longctx inspect chats.json smollm2 --salvage --count 5
    """

    data: Positional[str]
    """Conversations or texts: a file, folder, hub id, or "sample"."""
    model: Positional[str]
    """Whose tokenizer and chat template: checkpoint folder, hub id, GGUF file, or "demo"."""
    count: int = 3
    """Samples to show."""
    stretch: int = 400
    """Most characters of each stretch; 0 shows all."""
    max_length: int = 16_384
    """Most tokens of a sample."""
    overflow: Literal["continue", "drop", "cut"] = "continue"
    """A longer conversation goes on as a further sample, is dropped there, or is cut."""
    template: str | None = None
    """Chat template: "vicuna" or a Jinja file; default: the tokenizer's own."""
    salvage: bool = False
    """Go on with the whole records of a file that breaks off."""
    strict: bool = False
    """Refuse conversations out of order instead of tidying them."""
    split: str = "train"
    """Of a hub id, a folder, or a file with a list for each split."""
    skip_bad: bool = False
    """Leave out records that cannot be used, and count them by reason."""

    def run(self) -> int:
        """Prepare and print."""
        from longctx.train.data.preparation import TokenizeSettings, prepare
        from longctx.train.data.preview import inspect_samples

        from ..checkpoint import load_tokenizer
        from ..errors import RunError

        if self.count < 1:
            raise RunError(f"--count {self.count}: expected 1 or more samples.")
        tokenizer = load_tokenizer(self.model)
        settings = TokenizeSettings(self.max_length, self.overflow, self.template, self.strict)
        options: dict[str, Any] = {
            "salvage": self.salvage,
            "split": self.split,
            "skip_bad": self.skip_bad,
        }
        prepared = prepare(self.data, tokenizer, settings, **options)
        print(prepared.report)
        rows: Any = prepared.dataset
        inspect_samples(rows, tokenizer, count=self.count, stretch=self.stretch)
        return 0


COMMAND = Inspect
