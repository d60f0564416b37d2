"""The command that examines a checkpoint: `longctx doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from ..serving.engines import Engine

__all__ = ["COMMAND", "Doctor"]


@dataclass(frozen=True, slots=True)
class Doctor:
    """Find settings in a checkpoint that fail silently on long inputs.

    Exit code 1 if there are any. Reads its JSON files only: no weights, no code.

    Examples:
        longctx doctor smollm2-16k
        longctx doctor demo
        longctx doctor smollm2-16k --engine vllm
    """

    model: Positional[str]
    """Checkpoint folder, or "demo"."""
    engine: Engine | None = None
    """Also say what this engine does with it."""

    def run(self) -> int:
        """Print the findings."""
        from rich.console import Console
        from rich.text import Text

        from ..checkpoint import local_folder
        from ..doctor import examine
        from ..errors import printable

        console = Console(highlight=False, soft_wrap=True)
        findings = examine(local_folder(self.model), self.engine)
        for finding in findings:
            colour = "red" if finding.level == "problem" else "yellow"
            said = printable(f" {finding.where}: {finding.what}\n        → {finding.mend}")
            console.print(Text.assemble((finding.level, colour), said))
        problems = sum(finding.level == "problem" for finding in findings)
        print(f"{problems} problems, {len(findings) - problems} notes in {printable(self.model)}")
        return 1 if problems else 0


COMMAND = Doctor
