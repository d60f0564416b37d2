"""The command that lists the decodings: `longctx decodings`."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from ..catalogue import entries
from .catalogue_table import print_entries

__all__ = ["COMMAND", "Decodings"]


@dataclass(frozen=True, slots=True)
class Decodings:
    """List the decodings, and the presets by what they are for.

    Examples:
        longctx decodings
        longctx decodings dry
    """

    names: Positional[tuple[str, ...]] = ()
    """Decodings to be shown at length; default: all in short."""

    def run(self) -> int:
        """Print them."""
        found = entries("longctx.generation.decodings", "DECODING")
        print_entries(
            found,
            self.names,
            lambda entry: f"longctx generate MODEL --prompt TEXT --decoding {entry.example()}",
        )
        if not self.names:
            from ..generation.presets import PRESETS

            for name, decoding in PRESETS.items():
                print(f"{name:<18} preset: {decoding}")
        return 0


COMMAND = Decodings
