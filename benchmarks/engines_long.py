"""Engines beyond a model's old window.

`python -m benchmarks.engines_long WORK MODEL METHOD TOKENS`

MODEL, a folder such as SmolLM2's, is put under METHOD (`yarn:2`), saved, and held against each
engine's server (`benchmarks/_servers.py`) at a prompt of TOKENS tokens: every token in vLLM, and
four positions in llama.cpp, where each costs a request. The folder WORK keeps what was measured; a
second run measures what is missing there and writes the table to RESULTS.md.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import longctx
from longctx.serving.engines import Engine

from ._measure import write_results
from ._servers import ENVIRONMENTS, python_of, version_of
from .engines import cell, checkpoint, measure, nats

_ENGINES: tuple[Engine, ...] = ("vllm", "llama.cpp")
_SECONDS = 20_000  # longest wait for an answer, on busy cores too


def row(engine: Engine, found: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    one: dict[str, Any] = next(iter(found.get("rows", [])), {})
    return {
        "engine": f"{engine} {version_of(engine)}",
        "tokens": f"{one.get('length', 0):,}",
        "compared": f"{one.get('compared', 0):,}",
        "largest": cell(found),
        "median": nats(one["median"]) if one else "–",
        "unextended": f"{one['between']:.2f}" if one.get("between") else "–",
    }


def main() -> None:
    """Measure what is missing and write the table."""
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers end with this process
    work, source, method, tokens = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    work.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.]+", "-", f"{Path(source).name}-{method}")
    folder = checkpoint(source, longctx.parse_method(method), work / name)
    rows: list[dict[str, str]] = []
    absent = [f"{e} (${ENVIRONMENTS[e][0]})" for e in _ENGINES if not python_of(e)]
    for engine in _ENGINES:
        if not python_of(engine):
            continue
        out = work / f"{name}-{tokens}.{engine}.json"
        if not out.exists():
            print(f"{name} on {engine}", flush=True)
            more = ["--lengths", str(tokens), "--timeout", str(_SECONDS)]
            more += ["--positions", "4"] * (engine == "llama.cpp")
            measure(engine, folder, out, more, threads=os.cpu_count() or 1)
        rows.append(row(engine, json.loads(out.read_text(encoding="utf-8"))))
    if rows:
        write_results(
            f"What engines compute: {Path(source).name} under {method}",
            "python -m benchmarks.engines_long WORK MODEL METHOD TOKENS",
            rows,
            "By serve-check, float32 on a CPU. Largest and median |Δ log p| of a prompt token "
            "against longctx; “unextended” is how far the model without the method is, at its "
            "largest. llama.cpp: keys and values in f32, no fused attention."
            + (f" Left out: {', '.join(absent)}." if absent else ""),
        )


if __name__ == "__main__":
    main()
