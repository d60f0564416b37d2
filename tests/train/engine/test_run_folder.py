"""The record of a run, damaged in the ways that files are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longctx.errors import RunError
from longctx.train.engine.run_folder import WHOLE, RunFolder

RUN = {"format": 2, "model": "demo", "weights": "0123", "method": "yarn:4", "rows": 8}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"run"', "[" * 10**5, "9" * 5000, '{"model": NaN}', "\x00"]
    + [json.dumps({**RUN, name: wrong}) for name in ("model", "weights", "method")
       for wrong in (None, 3, [], {"a": 1})]
    + [json.dumps({k: v for k, v in RUN.items() if k != name})
       for name in ("model", "weights", "method")],
)  # fmt: skip
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(RunError, match=r"run\.json: .*Choose another folder"):
        RunFolder.open(tmp_path, RUN, resume=True, first=True)


def test_a_record_of_today_is_read(tmp_path: Path) -> None:
    kept: dict[str, Any] = {**RUN, "steps": None, "data": {"content": "x"}}
    folder = RunFolder.open(tmp_path, kept, resume=False, first=True)
    assert folder.read() == kept


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    last = tmp_path / "checkpoints" / "checkpoint-2"
    last.mkdir(parents=True)
    state = {"global_step": 2, "max_steps": 4, "train_batch_size": 1, "log_history": []}
    (last / "trainer_state.json").write_text(json.dumps(state))
    save_file({"x": torch.zeros(2)}, last / "model.safetensors")
    (last / WHOLE).touch()
    assert RunFolder(tmp_path).last_checkpoint(first=True) == last
    (last / name).write_bytes((last / name).read_bytes()[:20])
    with pytest.raises(RunError, match=rf"{name}.*Delete .*checkpoint-2: the run then goes on"):
        RunFolder(tmp_path).last_checkpoint(first=True)


def test_a_run_has_one_writer_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from longctx.train.engine.run_folder import RunFolder
        record = {"format": 2, "model": "demo", "weights": "0123", "method": "yarn:4", "rows": 8}
        folder = RunFolder.open(Path(sys.argv[1]), record, resume=False, first=True)
        print("open", flush=True)
        sys.stdin.read()
    """)
    command = [sys.executable, "-c", script, str(tmp_path / "x")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        for resume in (True, False):
            with pytest.raises(RunError, match="another process is writing to the run in"):
                RunFolder.open(tmp_path / "x", RUN, resume=resume, first=True)
        RunFolder.open(tmp_path / "x", RUN, resume=True, first=False)  # a further rank takes none
        other.kill()
    folder = RunFolder.open(tmp_path / "x", RUN, resume=True, first=True)
    folder.close()
    RunFolder.open(tmp_path / "x", RUN, resume=True, first=True).close()


def test_a_folder_with_a_foreign_record_is_left(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"port": 80}')
    with pytest.raises(RunError):
        RunFolder.open(tmp_path, RUN, resume=False, first=True)
    assert (tmp_path / "run.json").read_text() == '{"port": 80}'


@pytest.mark.parametrize("name", ["run.json", "log.jsonl", ".lock", "checkpoints", "model"])
def test_a_fifo_in_a_run_is_not_waited_for(name: str, tmp_path: Path) -> None:
    if name != "run.json":
        (tmp_path / "run.json").write_text(json.dumps(RUN))
    os.mkfifo(tmp_path / name)
    with pytest.raises(RunError, match="is a FIFO"):
        RunFolder.open(tmp_path, RUN, resume=True, first=True)
