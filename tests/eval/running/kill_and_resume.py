"""Run as a script by test_kill.py: sweeps killed at random moments, each resumed to its end.

A process of its own, since it forks: OMP_NUM_THREADS=1 keeps torch from starting threads before.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq

from longctx.eval import Passkey, Perplexity, sweep
from longctx.prompts.passkey_prompts import SHORT

from ..conftest import byte_model, byte_tokenizer


def run(folder: Path, texts: str) -> list[Any]:
    """Sweep into a folder; returns the rows without their times."""
    tasks = [
        Passkey(samples=4, depths=2, wording=SHORT, text=(texts,)),
        Perplexity(last=64, windows=3, text=(texts,)),
    ]
    result = sweep(
        byte_model(),
        byte_tokenizer(),
        tasks,
        (300, 500, 700),
        methods=["none", "yarn:2", "dynamic:2"],
        results=folder / "results.jsonl",
        progress=False,
    )
    return [repr(row).replace(f"seconds={row.seconds}", "") for row in result.rows]


def records(folder: Path) -> list[Any]:
    """The lines of a results file by key, without their times."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return sorted(({**line, "seconds": 0} for line in lines), key=lambda line: line.get("key", ""))


def count(folder: Path) -> int:
    """Whole lines that a results file has by now."""
    path = folder / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main(root: Path, texts: str, kills: int) -> None:
    """Compare `kills` killed and resumed sweeps with one that was left alone."""
    rows = run(root / "whole", texts)
    wanted = records(root / "whole")
    tables = sorted((root / "whole" / "tokens").iterdir())
    random, halfway = Random(0), 0
    for number in range(kills):
        folder = root / str(number)
        child = os.fork()
        if not child:
            run(folder, texts)
            os._exit(0)
        # After a random unit, at a random moment of the next one.
        after = random.randrange(len(wanted) - 1)
        while count(folder) < after:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        halfway += 1 < count(folder) < len(wanted)
        assert run(folder, texts) == rows, number
        assert records(folder) == wanted, number  # no unit twice: at most one was lost
        for table in tables:
            assert pq.read_table(folder / "tokens" / table.name).equals(pq.read_table(table))  # pyright: ignore[reportUnknownMemberType]
        assert len(list((folder / "tokens").iterdir())) == len(tables), number
    print(f"{kills} kills, {halfway} of them halfway")
    assert halfway >= kills // 2


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
