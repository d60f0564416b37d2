"""The record of a run, damaged in the ways that files are."""

from __future__ import annotations

import json
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
