"""The command that ranks: `longctx leaderboard`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ..errors import RunError

__all__ = ["COMMAND", "Leaderboard"]


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """Write many sweeps as one sortable HTML page that needs no network.

    Each RUN is the --out folder of a `longctx sweep`, or a folder that holds several. Models and
    methods stand in one table where a task had the same settings.

    Examples:
        longctx leaderboard runs
        longctx leaderboard runs/llama runs/qwen --out board.html
    """

    runs: Positional[tuple[Path, ...]]
    """Folders of sweeps, or folders that hold such."""
    out: Path = Path("leaderboard.html")
    """File to write."""
    overwrite: bool = False
    """Replace the page that is there."""

    def run(self) -> int:
        """Read, write and say what is on the page."""
        from longctx.eval.reporting.leaderboard import folders_of, write_leaderboard

        if not self.runs:
            raise RunError("no run to rank: name folders of `longctx sweep`.")
        folders = folders_of(self.runs)
        path = write_leaderboard(folders, self.out, overwrite=self.overwrite)
        print(f"{path} ({len(folders)} sweeps, {path.stat().st_size / 1000:,.0f} kB)")
        return 0


COMMAND = Leaderboard
