"""Sweeps that are killed, and sweeps that several processes share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed_sweeps_equal_the_one_left_alone(
    kills: int, tmp_path: Path, texts: tuple[str, ...]
) -> None:
    said = run("-m", "tests.eval.running.kill_and_resume", str(tmp_path), texts[0], str(kills))
    assert f"{kills} kills" in said


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    sweep = [
        *("longctx", "sweep", "demo", "--lengths", "256,384", "--samples", "4", "--windows", "3"),
        *("--methods", "none", "yarn:2", "--device", "cpu", "--out"),
    ]
    run("-m", *sweep, str(tmp_path / "one"))
    said = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", *sweep, str(tmp_path / "two")),
    )
    assert said.count("results.jsonl are in") == 1
    one, two = (pd.read_csv(tmp_path / name / "sweep.csv") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"))
    parts = sorted(path.name for path in (tmp_path / "two").glob("*.jsonl"))
    assert parts == ["results.1of2.jsonl", "results.jsonl"]
    lengths = [len((tmp_path / "two" / part).read_text().splitlines()) for part in parts]
    assert min(lengths) > 3
