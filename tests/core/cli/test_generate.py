"""`longctx generate` and `longctx decodings`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import longctx
from longctx.checkpoint import save
from longctx.cli.main import main
from longctx.errors import RunError
from longctx.generation.row_file import RowFile

from ...families import build
from ...test_matrix import demo_tokenizer

SHORT = ["--max-new-tokens", "6"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_decodings_are_listed_with_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decodings"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--decoding {name}" in shown for name in longctx.available_decodings())
    assert "retrieval          preset: NoRepeat(" in shown
    assert main(["decodings", "dry"]) == 0
    assert "pull request 5677" in capsys.readouterr().out
    assert main(["decodings", "dri"]) == 2
    assert "did you mean 'dry'" in capsys.readouterr().err


def test_text_is_printed_and_streamed_alike(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "demo", "--prompt", "The parser", "Once", "--decoding", "dry", *SHORT]
    assert main([*command, "--guard", "mend"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("[0] ")
    assert main([*command, "--guard", "mend", "--stream"]) == 0
    assert capsys.readouterr().out == printed


def test_the_first_example_of_the_help_runs(capsys: pytest.CaptureFixture[str]) -> None:
    # The default length is more than the embedded model's window leaves.
    command = ["generate", "demo", "--prompt", "parser " * 60, "A"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("[0] ")


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "said.jsonl"
    (tmp_path / "prompts.txt").write_text("".join(f"The number {n} is\n" for n in range(12)))
    line = ["generate", "demo", "--file", str(tmp_path / "prompts.txt"), "--out", str(out)]
    line += ["--batch-size", "1", "--max-new-tokens", "24", "--decoding", "sample"]
    run = subprocess.Popen([sys.executable, "-m", "longctx", *line], stderr=subprocess.DEVNULL)
    while not out.exists() or len(out.read_bytes().splitlines()) < 2:
        time.sleep(0.01)
        assert run.poll() is None
    run.kill()
    run.wait()
    assert main(line) == 0
    rows = rows_of(out)
    assert [row["row"] for row in rows] == list(range(12))
    whole = tmp_path / "whole.jsonl"
    assert main([str(whole) if part == str(out) else part for part in line]) == 0
    assert rows_of(whole) == rows


def test_rows_are_written_and_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "said.jsonl"
    lines = ['"The parser"', '{"prompt": "Once"}', "[5, 9, 17]", '{"input_ids": [4, 8]}', ""]
    source.write_text("\n".join(lines))
    command = ["generate", "demo", "--file", str(source), "--out", str(out), *SHORT]
    assert main([*command, "--decoding", "sample", "--batch-size", "3"]) == 0
    shown = capsys.readouterr()
    assert f"4 rows are in {out}" in shown.out
    whole = out.read_bytes()
    rows = rows_of(out)
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert all(len(row["token_ids"]) <= 6 and row["finish_reason"] for row in rows)
    assert rows[0]["settings"]["decoding"].startswith("Sample(")

    cut = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(cut[:2]) + cut[2][:30])  # as a killed process leaves it
    assert main([*command, "--decoding", "sample", "--batch-size", "1"]) == 0
    assert "4 rows are in" in capsys.readouterr().out
    assert out.read_bytes() == whole
    assert [path.name for path in out.parent.iterdir()] == ["said.jsonl"]

    assert main([*command, "--decoding", "greedy"]) == 2
    assert "was made with decoding='Sample(" in capsys.readouterr().err
    source.write_text('"Another"\n' + "\n".join(lines[1:]))
    assert main([*command, "--decoding", "sample"]) == 2
    assert "row 0 of other prompts" in capsys.readouterr().err
    assert out.read_bytes() == whole


def test_a_file_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("notes without a line's end", "notes\n", '{"row": 0}\n', "[1]\n", "\x00\n"):
        out = tmp_path / "notes.jsonl"
        out.write_text(text)
        command = ["generate", "demo", "--prompt", "Once", "--out", str(out), *SHORT]
        assert main(command) == 2
        assert "generated row" in capsys.readouterr().err
        assert out.read_text() == text


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        RowFile(tmp_path / "out.jsonl", {}, ["a"]),
        pytest.raises(RunError, match="another process writes"),
    ):
        RowFile(tmp_path / "out.jsonl", {}, ["a"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass --prompt"),
        (["--prompt", "x", "--file", "y.txt"], "not both"),
        (["--file", "missing.txt"], "missing.txt is not there"),
        (["--file", "."], "a folder, a device or a FIFO"),
        (["--file", "/dev/zero"], "a folder, a device or a FIFO"),
        (["--file", "fifo"], "a folder, a device or a FIFO"),
        (["--prompt", "x", "--out", "fifo"], "is a FIFO"),
        (["--prompt", "x", "--out", "/dev/null"], "is a device"),
        (["--prompt", "x", "--out", "."], "is a folder"),
        (["--file", "ok.txt", "--out", "ok.txt"], "is or holds the input"),
        (["--prompt", "x", "--out", "a.jsonl", "--stream"], "leave one out"),
        (["--prompt", "x", "--decoding", "dri"], "did you mean 'dry'"),
        (["--prompt", "x", "--guard", "mendd"], "did you mean 'mend'"),
        (["--prompt", "x", "--method", "yran:2"], "did you mean 'yarn'"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--prompt", "x", "--max-new-tokens", "9999"], "max_new_tokens=9,999"),
        (["--prompt", ""], "prompt 0 is empty"),
        (["--file", "empty.txt"], "holds no prompts"),
        (["--file", "latin.txt"], "not UTF-8"),
        (["--file", "bad.jsonl"], "bad.jsonl:2 is not JSON"),
        (["--file", "two.jsonl"], "holds 2 prompts"),
        (["--file", "number.jsonl"], "number.jsonl:1 is '3'"),
        (["--file", "NESTED.JSONL"], "NESTED.JSONL:2 is '[[5], [7]]'"),
        (["--file", "nul.txt"], "nul.txt holds NUL bytes"),
        (["--file", "half.jsonl"], "prompt 0 holds half a surrogate pair"),
        (["--file", "ok.txt", "--chat"], "--chat is for --prompt"),
        (["--prompt", "x", "--decoding", "dry:breakers=''"], "empty text"),
        (["--prompt", "x", "--decoding", "beam", "--guard", "mend"], "use the guard 'ban'"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("ok.txt").write_text("Once\n")
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("bad.jsonl").write_text('"a"\n{\n')
    Path("two.jsonl").write_text('{"prompt": "a", "messages": []}\n')
    Path("number.jsonl").write_text("3\n")
    Path("NESTED.JSONL").write_text('"a"\n[[5], [7]]\n')
    Path("nul.txt").write_text("a\0b\n")
    Path("half.jsonl").write_text('"\\ud800"\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["generate", "demo", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_model_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from longctx.generation import detokenize, generate

    save(build("llama"), demo_tokenizer(), tmp_path / "base")

    def wild(tokenizer: Any, tokens: Any) -> str:
        return "\x1b[31m" * len(tokens)

    monkeypatch.setattr(detokenize, "text_of", wild)
    monkeypatch.setattr(generate, "text_of", wild)
    for further in ([], ["--stream"]):
        command = ["generate", str(tmp_path / "base"), "--prompt", "x", *SHORT, *further]
        assert main([*command, "--ignore-eos"]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "\\x1b[31m" in out


def test_sigint_leaves_a_valid_file_that_is_gone_on_with(tmp_path: Path) -> None:
    source, out = tmp_path / "prompts.txt", tmp_path / "said.jsonl"
    source.write_text("Once upon a time\n" * 400)
    command = [
        sys.executable, "-m", "longctx", "generate", "demo", "--file", str(source), "--out",
        str(out), "--batch-size", "4", "--max-new-tokens", "60", "--ignore-eos",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    rows = rows_of(out)
    assert 0 < len(rows) < 400
    assert [row["row"] for row in rows] == [*range(len(rows))]


def test_a_method_is_put_on_first(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "word " * 300
    command = ["generate", "demo", "--prompt", prompt, *SHORT]
    assert main(command) == 2
    assert "the model's window is 256" in capsys.readouterr().err
    assert main([*command, "--method", "yarn:4+log_n"]) == 0
