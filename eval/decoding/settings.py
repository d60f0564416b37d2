"""What a decode bench writes on after, and how far: for Python and the command line alike."""

from __future__ import annotations

from dataclasses import dataclass

from longctx.errors import RunError

__all__ = ["BenchSettings"]


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What is written on, and how far."""

    prompts: int = 50
    """Windows of real text, spread over the documents, at most."""
    prompt_tokens: int = 64
    """Tokens before each continuation."""
    new_tokens: int = 128
    """Tokens of each continuation. Ends of text are passed over, so that all are equally long."""
    samples: int = 4
    """Continuations of each prompt where the decoding draws; else one."""
    keys: int = 24
    """Passkey prompts that are answered too; 0 for none."""
    key_length: int = 256
    """Tokens of each of those."""
    guard: str = "none"
    """Against loops, for all decodings: "ban", "mend", or MODE:field=value,…."""
    seed: int = 0
    """Of what is drawn, and of the keys."""
    text: tuple[str, ...] = ()
    """Files or folders, a document per file; none means the embedded held-out documents."""

    def __post_init__(self) -> None:
        least = {"prompts": 2, "prompt_tokens": 1, "new_tokens": 8, "samples": 1}
        for name, low in {**least, "keys": 0, "key_length": 1, "seed": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise RunError(f"{name}={value!r}: expected a whole number, {low} or more.")
        if self.guard != "none":
            from longctx.generation.loop_guard import parse_guard  # takes torch; help needs none

            parse_guard(self.guard)
