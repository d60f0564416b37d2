"""A folder is put in its place in one step, whatever kills the process, and never lost unasked."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from longctx import folders
from longctx.checkpoint import locate
from longctx.cli.main import main
from longctx.errors import ModelError, RunError
from longctx.files import write_whole
from longctx.folders import left_over, new_folder, refuse_inputs


def checkpoint(folder: Path, version: str = "old") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": version}))
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


def version_of(folder: Path) -> str:
    assert (folder / "model.safetensors").exists(), "whole"
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def _no_exchange(one: Path, other: Path) -> bool:
    del one, other
    return False


@pytest.mark.parametrize("exchange", [True, False])
def test_the_new_folder_takes_the_place_of_the_old(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", _no_exchange)
    out = checkpoint(tmp_path / "m")
    with new_folder(out, overwrite=True) as staging:
        checkpoint(staging, "new")
        assert version_of(out) == "old"
    assert version_of(out) == "new"
    assert os.listdir(tmp_path) == ["m"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from longctx import folders
    out, name, exchange = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
    if not exchange:
        folders._exchange = lambda one, other: False
    place = {"rename": Path, "rmtree": folders.shutil, "_exchange": folders}[name]
    real = getattr(place, name)
    def once(*arguments, **options):
        if name != "rmtree":
            real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(place, name, once)
    with folders.new_folder(out, overwrite=True) as staging:
        (staging / "config.json").write_text('{"model_type": "new"}')
        (staging / "model.safetensors").write_bytes(b"x")
"""


@pytest.mark.parametrize(
    ("name", "exchange", "wanted"),
    [
        ("_exchange", True, "new"),
        ("rmtree", True, "new"),
        ("rename", False, "old"),  # between the two renames of a system that cannot exchange
        ("rmtree", False, "new"),
    ],
)
def test_a_whole_folder_is_there_after_a_kill(
    name: str, exchange: bool, wanted: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = checkpoint(tmp_path / "m")
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(out), name, str(exchange)]
    assert subprocess.run(script, check=False).returncode == -signal.SIGKILL
    assert left_over(out)
    if (name, exchange) == ("rename", False):
        with pytest.raises(ModelError, match=r"A run was killed .*\.m-old-.* may be whole"):
            locate(out)
    else:
        assert version_of(out) == wanted
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(RunError, match="exists and is not empty"),
        new_folder(out),
    ):
        pass
    assert version_of(out) == wanted
    with new_folder(out, overwrite=True) as staging:
        checkpoint(staging, "next")
    assert "was killed" in caplog.text
    assert version_of(out) == "next"


def test_what_is_being_written_is_not_taken_for_left_over(tmp_path: Path) -> None:
    with new_folder(tmp_path / "m") as staging:
        assert staging.is_dir()
        assert left_over(tmp_path / "m") == []


def _thesis(folder: Path) -> None:
    (folder / "thesis.txt").write_text("years of work")


def _folder_inside(folder: Path) -> None:
    (folder / "data").mkdir()


def _other_weights(folder: Path) -> None:
    (folder / "prices.safetensors").write_bytes(b"x")


def _other_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"port": 80}')


def _damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 10_000)


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "README.md")


def _dangling(folder: Path) -> None:
    (folder / "README.md").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (_thesis, r"holds thesis\.txt, which no checkpoint has"),
        (_folder_inside, "holds data, which no checkpoint has"),
        (_other_weights, r"holds prices\.safetensors, which no checkpoint has"),
        (_other_config, "is not a checkpoint folder"),
        (_damaged_config, "is not a checkpoint folder"),
        (_fifo, r"holds README\.md, which no checkpoint has"),
        (_dangling, r"holds README\.md, which no checkpoint has"),
    ],
)
def test_only_whole_checkpoints_are_replaced(
    add: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    out = checkpoint(tmp_path / "m")
    add(out)
    before = sorted(os.listdir(out))
    with pytest.raises(RunError, match=said), new_folder(out, overwrite=True):
        pass
    assert sorted(os.listdir(out)) == before


def test_an_output_is_not_the_input_nor_holds_it(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "run" / "model")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "hard.json").hardlink_to(model / "config.json")
    other = checkpoint(tmp_path / "other")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(other / "model.safetensors")
    for out, source in (
        (model, model),
        (tmp_path / "run", model),
        (tmp_path / "link", model),
        (model, tmp_path / "link"),
        (tmp_path / "hard.json", model / "config.json"),
        (other, linked),
    ):
        with pytest.raises(RunError, match="is or holds the input"):
            refuse_inputs(out, [source])
    refuse_inputs(tmp_path / "free", [model, "org/name"])
    refuse_inputs(other, [model, "org/name"])


@pytest.mark.parametrize("command", [["convert"], ["extend", "--method", "yarn:2"]])
def test_commands_do_not_replace_their_input(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "demo", str(tmp_path / "m")]) == 0
    (tmp_path / "l").symlink_to("m")
    name, *options = command
    for source, out in (("m", "m"), ("m", "l"), ("l", "m"), ("m", ".")):
        line = [name, str(tmp_path / source), str(tmp_path / out), *options, "--overwrite"]
        assert main(line) == 2
        assert "is or holds the input" in capsys.readouterr().err
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", lambda part: part.write_text("new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
