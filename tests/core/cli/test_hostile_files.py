"""Damaged and hostile files through the command line: a refusal or an answer, never a traceback.

pytest -m slow -s tests/core/cli/test_hostile_files.py prints how many of each kind were tried.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from longctx.cli.main import main

LIMIT = 60  # seconds for a command line
WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 1, 0.5, -1e308, 10**9, 10**30, "", "x", "-3", "[bold]x[/y]", "\x1b[31mx\x00",
    "../../x", [], {}, [[]], {"a": None}, [None, -1], "é" * 300,
)  # fmt: skip

Bytes = Callable[[random.Random, bytes], bytes]
BYTES: dict[str, Bytes] = {
    "empty": lambda rng, data: b"",
    "cut off": lambda rng, data: data[: rng.randrange(len(data))],
    "random bytes": lambda rng, data: rng.randbytes(200),
    "a byte changed": lambda rng, data: _changed(rng, data),
    "bytes in between": lambda rng, data: data[:20] + rng.randbytes(8) + data[20:],
    "deeply nested": lambda rng, data: b"[" * 100_000,
    "nested objects": lambda rng, data: b'{"a":' * 50_000,
    "a huge number": lambda rng, data: b"9" * 5_000,
    "NaN": lambda rng, data: b'{"model_type": NaN}',
    "another value": lambda rng, data: rng.choice([b"null", b"[]", b"3", b'"x"', b"{}", b"true"]),
    "UTF-16": lambda rng, data: data[:2000].decode("latin1").encode("utf-16"),
    "twice": lambda rng, data: data + data,
}


def _changed(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(min(len(data), 3_000))
    return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    keys: Any = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def spoil(rng: random.Random, text: str) -> str:
    """One place of a JSON text with a wrong value, none, or under another name."""
    value = json.loads(text)
    whole, key = rng.choice(list(places(value))[:400])
    what = rng.randrange(8)
    if what == 0:
        del whole[key]
    elif what == 1 and isinstance(whole, dict):
        whole[f"{key}[/x]\x1b"] = whole.pop(key)
    else:
        whole[key] = rng.choice(WRONG)
    return json.dumps(value)


def damage(rng: random.Random, path: Path) -> str:
    """Damage a file and say how."""
    data = path.read_bytes()
    is_json = path.suffix in (".json", ".jsonl")
    if is_json and rng.random() < 0.6:
        lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
        number = rng.randrange(len(lines))
        lines[number] = spoil(rng, lines[number])
        path.write_text("\n".join(lines) + "\n")
        return "a JSON value"
    kind = rng.choice(list(BYTES))
    path.write_bytes(BYTES[kind](rng, data))
    return kind


@contextmanager
def limited() -> Generator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault(command: list[str]) -> str | None:
    """What is wrong with how a command line ends, None if nothing is."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with limited(), warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
            warnings.simplefilter("ignore")
            code = main(command)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in where if "site-packages" not in frame.filename][-1]
        return f"{type(error).__name__}: {str(error)[:150]} ({own.filename}:{own.lineno})"
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback" in err.getvalue() + out.getvalue():
        return "a traceback"
    if "\x1b" in err.getvalue() + out.getvalue():
        return "control characters"
    return None if code != 2 or err.getvalue().strip() else "no message"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, one in shards, a sweep, a run and data, all sound."""
    home = tmp_path_factory.mktemp("whole")
    assert main(["extend", "demo", str(home / "model"), "--method", "yarn:2"]) == 0
    shutil.copytree(home / "model", home / "shards")
    (home / "shards" / "model.safetensors").unlink()
    weights = load_file(home / "model" / "model.safetensors")
    name = "model-00001-of-00001.safetensors"
    save_file(weights, home / "shards" / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
    (home / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    sweep = ["sweep", "demo", "--lengths", "256,512", "--tasks", "passkey", "--samples", "2"]
    assert main([*sweep, "--out", str(home / "sweep")]) == 0
    train = ["train", str(home / "model"), "--output-dir", str(home / "run"), *TRAIN]
    (home / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    assert main([*train, "--data", str(home / "chats.jsonl")]) == 0
    shutil.rmtree(home / "run" / "model")  # as if it was killed before its end
    return home


CHATS = [
    {
        "conversations": [
            {"from": "human", "value": f"Question {n}?"},
            {"from": "gpt", "value": "A."},
        ]
    }
    for n in range(8)
]
TRAIN = (
    "--method", "none", "--max-length", "256", "--max-steps", "2", "--save-every", "1",
    "--batch-size", "1", "--gradient-accumulation-steps", "1", "--template", "vicuna",
    "--warmup", "0", "--evaluate", "--lora-r", "0",
)  # fmt: skip
MODEL = [
    ["doctor", "model"],
    ["convert", "model", "out"],
    ["extend", "model", "out", "--method", "linear:2"],
    ["plan", "model", "--max-length", "512"],
    ["inspect", "chats.jsonl", "model", "--template", "vicuna", "--count", "1"],
]
CASES: dict[str, tuple[list[list[str]], int]] = {
    "model/config.json": (MODEL, 90),
    "model/generation_config.json": (MODEL[:3], 20),
    "model/tokenizer.json": ([*MODEL[:2], MODEL[4]], 30),
    "model/tokenizer_config.json": ([*MODEL[:2], MODEL[4]], 30),
    "model/model.safetensors": (MODEL[1:3], 30),
    "shards/model.safetensors.index.json": ([["convert", "shards", "out"]], 40),
    "sweep/sweep.json": (
        [
            ["report", "sweep", "--out", "r.html"],
            ["compare", "a=sweep", "b=sound"],
            ["sweep", "demo", "--lengths", "256", "--tasks", "passkey", "--samples", "2",
             "--out", "sweep"],
        ],
        90,
    ),
    "sweep/results.jsonl": ([["report", "sweep", "--out", "r.html"],
                             ["compare", "a=sweep", "b=sound"]], 60),
    "run/run.json": ([["train", "model", "--resume", *TRAIN]], 20),
    "run/checkpoints/checkpoint-2/trainer_state.json": (
        [["train", "model", "--resume", *TRAIN]], 15,
    ),
    "chats.jsonl": ([["train", "model", "--dry-run", *TRAIN], MODEL[4]], 40),
}  # fmt: skip


@pytest.mark.slow
def test_damaged_files_are_refused_without_a_traceback(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rng = random.Random(20_261_127)
    tried: Counter[tuple[str, str]] = Counter()
    failed: list[str] = []
    for name, (commands, count) in CASES.items():
        for number in range(count):
            home = tmp_path / f"{tried.total()}"
            shutil.copytree(whole, home)
            shutil.copytree(whole / "sweep", home / "sound")
            monkeypatch.chdir(home)
            kind = damage(rng, home / name)
            command = list(commands[number % len(commands)])
            if command[0] == "train":
                command += ["--data", "chats.jsonl", "--output-dir"]
                command += ["new" if "--dry-run" in command else "run"]
            tried[Path(name).name, kind] += 1
            if said := fault(command):
                failed.append(f"{name}, {kind}, {' '.join(command[:3])}: {said}")
                shutil.copy(home / name, tmp_path / f"{len(failed)}-{Path(name).name}")
            shutil.rmtree(home)
    with capsys.disabled():
        files, kinds = (Counter[str](), Counter[str]())
        for (file, kind), n in tried.items():
            files[file] += n
            kinds[kind] += n
        print(f"\n{tried.total()} command lines on damaged files, {len(failed)} failures")
        print("by file:", ", ".join(f"{file} {n}" for file, n in files.items()))
        print("by kind:", ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()))
        print("\n".join(failed))
    assert not failed
