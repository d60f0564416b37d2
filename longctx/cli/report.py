"""The command that shows: `longctx report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

__all__ = ["COMMAND", "Report"]


@dataclass(frozen=True, slots=True)
class Report:
    """Write what sweeps and decode benches found as one HTML file.

    Each RUN is the --out folder of a `longctx sweep` or `longctx decode-bench`. Heatmaps by length
    and depth, values with their intervals, loss by position, effective lengths, failed answers,
    cost and settings; of decodings their figures with intervals, and loops to read.

    Examples:
        longctx report sweep
        longctx report runs/base runs/tuned --out compare.html --plots
        longctx report runs/base runs/decodings --out all.html
    """

    runs: Positional[tuple[Path, ...]]
    """Folders of sweeps and decode benches, shown beside each other."""
    out: Path = Path("report.html")
    """File to write."""
    plots: bool = False
    """Write every plot of a sweep beside it too, as PNG and SVG."""
    overwrite: bool = False
    """Replace files that are there."""

    def run(self) -> int:
        """Read, check and write."""
        from longctx.eval.reporting.html import write_html

        paths = write_html(self.runs, self.out, plots=self.plots, overwrite=self.overwrite)
        print(f"{self.out} ({paths[0].stat().st_size / 1000:,.0f} kB)")
        if self.plots:
            print(f"{len(paths) - 1} plots are beside it: {', '.join(p.name for p in paths[1:])}")
        return 0


COMMAND = Report
