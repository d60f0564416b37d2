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
from longctx.eval.results import journal
from longctx.prompts.passkey_prompts import SHORT

from ..conftest import byte_model, byte_tokenizer


def run(folder: Path, texts: str) -> list[Any]:
    """Sweep into a folder; returns the rows without their times."""
    tasks = [
        Passkey(samples=6, depths=3, wording=SHORT, text=(texts,)),
        Perplexity(last=64, windows=3, text=(texts,)),
    ]
    result = sweep(
        byte_model(),
        byte_tokenizer(),
        tasks,
        (300, 500, 700),
        methods=["none", "yarn:2", "dynamic:2"],
        results=folder / "results.jsonl",
        batch_tokens=700,  # one prompt or two at a time
        progress=False,
    )
    return [repr(row).replace(f"seconds={row.seconds}", "") for row in result.rows]


def records(folder: Path) -> list[Any]:
    """The lines of a results file by key, without their times."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return sorted(({**line, "seconds": 0} for line in lines), key=lambda line: line.get("key", ""))


def count(folder: Path, name: str = "results.jsonl") -> int:
    """Whole lines that a file has by now."""
    try:
        return (folder / name).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def main(root: Path, texts: str, kills: int) -> None:
    """Compare `kills` killed and resumed sweeps with one that was left alone."""
    rows = run(root / "whole", texts)
    wanted = records(root / "whole")
    tables = sorted((root / "whole" / "tokens").iterdir())
    random, halfway, within = Random(0), 0, 0
    journal._EVERY = 0.0  # pyright: ignore[reportPrivateUsage]
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
        part = "results.jsonl.part"
        if number % 2:  # in the middle of a cell, if there is still one to come
            while count(folder, part) < 3 and count(folder) < len(wanted):
                time.sleep(0.0005)
        else:
            time.sleep(random.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        halfway += 1 < count(folder) < len(wanted)
        within += count(folder, part) > 1
        assert run(folder, texts) == rows, number
        assert records(folder) == wanted, number  # no unit twice: at most one was lost
        for table in tables:
            assert pq.read_table(folder / "tokens" / table.name).equals(pq.read_table(table))  # pyright: ignore[reportUnknownMemberType]
        assert len(list((folder / "tokens").iterdir())) == len(tables), number
        assert not (folder / part).exists()
    print(f"{kills} kills, {halfway} of them halfway, {within} within a cell")
    assert halfway >= kills // 2
    assert within


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
