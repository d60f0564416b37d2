"""CONTRIBUTING's example of a task is put into the folder, and is all that a task takes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longctx.catalogue import entries
from longctx.cli.main import main
from longctx.eval import available_tasks, sweep

from ...test_layout import ROOT
from ..conftest import byte_model, byte_tokenizer

SECTION = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding a task")[2]
TASK, TEST = re.findall(r"```python\n(.*?)```", SECTION.partition("\n## ")[0], re.DOTALL)


@pytest.fixture
def room_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "room_number.py").write_text(TASK)
    package = importlib.import_module("longctx.eval.tasks")
    package.__path__.append(str(tmp_path))
    entries.cache_clear()
    yield
    package.__path__.remove(str(tmp_path))
    entries.cache_clear()


@pytest.mark.usefixtures("room_number")
def test_its_test_passes(texts: tuple[str, ...]) -> None:
    written: dict[str, Any] = {"__package__": __package__, "__name__": "written"}
    exec(TEST, written)
    written["test_properties"](texts)


@pytest.mark.usefixtures("room_number")
def test_sweep_and_command_know_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "room_number" in available_tasks()
    found = sweep(byte_model(), byte_tokenizer(), ["room_number:samples=2"], 1500, progress=False)
    assert found.rows[0].task == "room_number"
    assert main(["tasks", "room_number"]) == 0
    assert "digits: int = 4" in capsys.readouterr().out
    assert main(["sweep", "--help"]) == 0
    assert "room_number: Digits of a room's number." in " ".join(
        capsys.readouterr().out.replace("│", "").split()
    )
    assert main(["sweep", "demo", "--tasks", "room_number", "--hops", "3"]) == 2
    assert "--hops is for the tasks variable_tracking" in capsys.readouterr().err
