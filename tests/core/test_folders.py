"""Outputs whose name something else has: refused by every command, and left as they were."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from longctx.cli.main import main
from longctx.errors import RunError
from longctx.files import write_whole
from longctx.folders import refuse_other_than_file, refuse_other_than_folder


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.close()


def _link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("target"))
    path.symlink_to("target")


def _link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


SPECIAL: dict[str, Callable[[Path], None]] = {
    "FIFO": _fifo,
    "socket": _socket,
    "link to a FIFO": _link_to_fifo,
    "link to a missing file": _link_to_nothing,
}


@pytest.fixture
def short_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A relative folder: the name of a socket has at most 108 bytes."""
    monkeypatch.chdir(tmp_path)
    return Path()


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_neither_file_nor_folder_is_named(kind: str, short_path: Path) -> None:
    out = short_path / "out"
    SPECIAL[kind](out)
    for refuse in (refuse_other_than_folder, refuse_other_than_file):
        with pytest.raises(RunError, match=f"out is a {kind}, which"):
            refuse(out)


def test_devices_are_named_without_being_touched() -> None:
    # Only looked at: a test that goes wrong here must not cost the machine its devices.
    for refuse in (refuse_other_than_folder, refuse_other_than_file):
        with pytest.raises(RunError, match="is a device"):
            refuse(Path(os.devnull))


def test_folders_files_and_free_names_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").symlink_to(tmp_path)
    refuse_other_than_folder(tmp_path / "free")
    refuse_other_than_folder(tmp_path / "folder")
    refuse_other_than_file(tmp_path / "free")
    refuse_other_than_file(tmp_path / "file")
    with pytest.raises(RunError, match=r"is a file, .* expected a folder"):
        refuse_other_than_folder(tmp_path / "file")
    with pytest.raises(RunError, match=r"is a folder, .* expected a file"):
        refuse_other_than_file(tmp_path)
    with pytest.raises(RunError, match=r"cannot write to .*Not a directory"):
        refuse_other_than_folder(tmp_path / "file" / "x")


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "demo", "OUT"],
        ["convert", "demo", "OUT", "--overwrite"],
        ["extend", "demo", "OUT", "--method", "yarn:4", "--overwrite"],
        ["train", "demo", "--data", "sample", "--output-dir", "OUT"],
        ["train", "demo", "--data", "sample", "--output-dir", "OUT", "--resume"],
        ["sweep", "demo", "--lengths", "256", "--out", "OUT", "--overwrite"],
        ["demo", "--samples", "1", "--out", "OUT"],
        ["compare", "RUN#none", "x=RUN#none", "--out", "OUT", "--overwrite"],
        ["report", "RUN", "--out", "OUT", "--overwrite"],
    ],
    ids=lambda command: " ".join(part for part in command if part.islower()),
)
@pytest.mark.parametrize("kind", ["FIFO", "link to a FIFO"])
def test_every_command_refuses_it_and_leaves_it(
    command: list[str],
    kind: str,
    short_path: Path,
    sweep_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = short_path / "out"
    SPECIAL[kind](out)
    named = [part.replace("OUT", str(out)).replace("RUN", str(sweep_folder)) for part in command]
    assert main(named) == 2
    assert capsys.readouterr().err.startswith(f"longctx {command[0]}: out")
    assert stat.S_ISFIFO(out.stat().st_mode)
    assert out.is_symlink() == (kind != "FIFO")
    assert {path.name for path in short_path.iterdir()} <= {"out", "target"}


@pytest.mark.parametrize("name", ["results.jsonl", "sweep.json", "sweep.csv"])
def test_a_fifo_inside_the_folder_is_left_too(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / name)
    command = ["sweep", "demo", "--lengths", "256", "--tasks", "perplexity", "--windows", "1"]
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert f"{name} is a FIFO" in capsys.readouterr().err
    assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)


def test_a_written_file_never_replaces_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(RunError, match="is a FIFO"):
        write_whole(tmp_path / "x", lambda part: part.write_text("y"))
    assert stat.S_ISFIFO((tmp_path / "x").stat().st_mode)


@pytest.fixture(scope="session")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept") / "run"
    command = ["sweep", "demo", "--lengths", "256,512", "--tasks", "perplexity", "--windows", "2"]
    assert main([*command, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", ["results.jsonl", "results.1of2.jsonl"])
@pytest.mark.parametrize("command", ["report", "compare", "sweep"])
def test_a_fifo_among_results_is_not_waited_for(
    command: str, name: str, sweep_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(sweep_folder, folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    lines = {
        "report": ["report", str(folder), "--out", str(tmp_path / "r.html")],
        "compare": ["compare", f"a={folder}", f"b={folder}"],
        "sweep": ["sweep", "demo", "--lengths", "256,512", "--tasks", "perplexity", "--windows",
                  "2", "--out", str(folder)],
    }  # fmt: skip
    assert main(lines[command]) == 2
    assert f"{name} is a FIFO" in capsys.readouterr().err


def test_a_fifo_as_test_file_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "x")
    out = ["--out", str(tmp_path / "out")]
    assert main(["sweep", "demo", "--tasks", "lines", "--file", str(tmp_path / "x"), *out]) == 2
    assert "is not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["report", "RUN", "--out", "FOLDER/results.jsonl", "--overwrite"], ["results.jsonl"]),
        (["report", "RUN", "--out", "FOLDER/thesis.txt", "--overwrite"], ["thesis.txt"]),
        (["compare", "a=RUN", "b=RUN", "--out", "FOLDER", "--overwrite"], ["compare.csv"]),
        (["compare", "a=RUN", "b=RUN", "--out", "FOLDER"], ["compare.png", "x"]),
        (["sweep", "demo", "--lengths", "256", "--out", "FOLDER"], ["sweep.csv"]),
    ],
)
def test_files_of_something_else_are_left(
    command: list[str],
    names: list[str],
    tmp_path: Path,
    sweep_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in names:
        (tmp_path / name).write_text("years of work")
    places = {"RUN": str(sweep_folder), "FOLDER": str(tmp_path)}
    for place, path in places.items():
        command = [part.replace(place, path) for part in command]
    assert main(command) == 2
    assert names[0] in capsys.readouterr().err
    assert all((tmp_path / name).read_text() == "years of work" for name in names)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_results_do_not_go_into_the_checkpoint_they_are_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "demo", str(tmp_path / "m")]) == 0
    before = sorted(os.listdir(tmp_path / "m"))
    for out in ("m", "m/results"):
        line = ["sweep", str(tmp_path / "m"), "--lengths", "256", "--out", str(tmp_path / out)]
        assert main(line) == 2
        assert "is the input" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "m")) == before


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    for refuse in (refuse_other_than_file, refuse_other_than_folder):
        with pytest.raises(RunError, match="File name too long"):
            refuse(tmp_path / ("x" * 300))
