"""The command line: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import longctx
from longctx.catalogue import entries
from longctx.checkpoint import save
from longctx.cli.main import main
from longctx.cli.sweep import Sweep
from longctx.eval import Lines, MultiKey, Passkey, Perplexity, Repetition, available_tasks

from ...families import build
from ...test_matrix import demo_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(build("llama"), demo_tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def test_methods_and_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown and f"--method {name}:" in shown for name in longctx.available())
    assert all(f"{name} " in shown and f"--to {name}:" in shown for name in longctx.conversions())
    assert "beta_fast: float = 32.0" in shown
    assert main(["tasks"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown and f"--tasks {name}:" in shown for name in available_tasks())
    assert "haystack: Literal['grass', 'text', 'both'] = 'both'" in shown


def test_one_of_them_is_shown_at_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "yarn"]) == 0
    shown = capsys.readouterr().out
    assert "arXiv:2309.00071" in shown
    assert "linear" not in shown
    assert main(["tasks", "nedle"]) == 2
    assert "did you mean 'needle'" in capsys.readouterr().err


def test_help_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 36
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("  sweep ") for line in lines)
    assert main([]) == 2
    assert capsys.readouterr().err.splitlines() == lines


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"longctx {longctx.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swep"], "no command 'swep'; did you mean 'sweep'?"),
        (["sweep"], "longctx sweep --help"),
        (["sweep", "demo", "--samplse", "3"], "longctx sweep --help"),
        (["sweep", "demo", "--samples", "many"], "longctx sweep --help"),
        (["sweep", "demo", "--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["sweep", "demo", "--batch-tokens", "1", "--batch_tokens=2"], "--batch-tokens is given"),
        (["plan", "demo", "--max-length", "9", "--pack", "--no-pack"], "--pack is given twice"),
    ],
)
def test_usage_errors_name_the_help_that_tells(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "--help" in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_extend_reports_saves_and_is_what_plain_transformers_loads(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["extend", str(checkpoint), str(out), "--method", "yarn:target=200"]) == 0
    shown = capsys.readouterr().out
    assert "window 64 → 200 tokens" in shown
    assert "loads in plain transformers" in shown
    config = AutoModelForCausalLM.from_pretrained(out).config
    assert config.max_position_embeddings == 200
    assert main(["doctor", str(out)]) == 0


def test_convert_copies_the_embedded_model_and_shows_no_bar_of_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "demo", str(tmp_path / "tiny")]) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "tiny" / "model.safetensors").exists()
    assert main(["doctor", str(tmp_path / "tiny")]) == 0


def test_doctor_exits_1_on_a_problem(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["max_position_embeddings"] = 64.0
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert main(["doctor", str(checkpoint)]) == 1
    assert "not a whole number" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extend", "{base}", "{out}", "--method", "yran:2"], "did you mean 'yarn'"),
        (["extend", "{base}", "{out}", "--method", "yarn:0"], "factor=0"),
        (["extend", "{base}", "{out}", "--method", "yarn:nan"], "factor='nan'"),
        (["extend", "{base}", "{out}", "--method", "none"], "extends nothing"),
        (["extend", "{base}", "{base}", "--method", "yarn:2"], "exists and is not empty"),
        (["extend", "./nowhere", "{out}", "--method", "yarn:2"], "does not exist"),
        (["convert", "./nowhere.gguf", "{out}"], "does not exist"),
        (["doctor", "./nowhere"], "does not exist"),
        (["sweep", "{base}", "--methods", "--out", "{out}"], "--methods names none"),
        (["sweep", "{base}", "--methods", "yran", "--out", "{out}"], "did you mean 'yarn'"),
        (["sweep", "{base}", "--lengths", "4x", "--out", "{out}"], "'4x' is not a length"),
        (["sweep", "demo", "--lengths", "20", "--out", "{out}"], "too short"),
        (["sweep", "demo", "--lengths", "20", "--out", "{out}"], "task passkey: length=20"),
        (
            ["sweep", "demo", "--tasks", "perplexity", "--verify", "20", "--out", "{out}"],
            "--verify is for the tasks ",
        ),
        (
            ["sweep", "demo", "--tasks", "passkey", "--stride", "8", "--out", "{out}"],
            "--stride is for the tasks perplexity",
        ),
        (
            ["sweep", "demo", "--tasks", "lines", "--haystack", "grass", "--out", "{out}"],
            "--haystack is for the tasks ",
        ),
        (
            ["sweep", "demo", "--tasks", "lines", "--file", "x", "--share-lengths"],
            "share_lengths is for prompts that are drawn",
        ),
        (
            ["sweep", "demo", "--tasks", "lines:file=x", "--adaptive", "--out", "{out}"],
            "cannot be asked one by one",
        ),
        (["sweep", "demo", "--tasks", "paskey"], "did you mean 'passkey'"),
        (["sweep", "demo", "--tasks", "passkey:digit=3"], "did you mean 'digits'"),
        (["sweep", "demo", "--tasks", "passkey:digits=x"], "digits='x': expected int"),
        (["sweep", "demo", "--tasks", "passkey:5"], "expected field=value, as in 'needle:"),
        (["sweep", "demo", "--tasks", "needle", "needle"], "asked for twice"),
        (["sweep", "demo", "--tasks", "needle", "--needle", "A."], "question and an answer"),
        (["sweep", "{base}", "--text", "./nowhere", "--out", "{out}"], "./nowhere"),
    ],
)
def test_bad_usage_exits_2_and_writes_nothing(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    filled = [argument.format(base=checkpoint, out=out) for argument in arguments]
    assert main(filled) == 2
    shown = capsys.readouterr()
    assert message.lstrip("./") in shown.err
    assert shown.out == ""
    assert not out.exists()


def test_sweep_writes_its_report_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["sweep", "demo", "--methods", "none", "yarn:2", "--lengths", "200,300"]
    arguments += ["--samples", "2", "--windows", "2", "--out", str(out), "--device", "cpu"]
    assert main(arguments) == 0
    first = (out / "results.jsonl").read_bytes()
    names = {path.name for path in out.iterdir()}
    assert names >= {"results.jsonl", "sweep.csv", "sweep.json", "sweep.png", "sweep.svg"}
    assert "yarn:2" in capsys.readouterr().out
    assert main(arguments) == 0
    assert (out / "results.jsonl").read_bytes() == first


def test_lists_and_help_are_quick_and_show_examples() -> None:
    """The heavy libraries are not imported for them."""
    commands = [entry.name.replace("_", "-") for entry in entries("longctx.cli", "COMMAND")]
    asked = [["--help"], ["methods"], ["tasks"], *([name, "--help"] for name in commands)]
    code = (
        "import sys\nfrom longctx.cli.main import main\n"
        f"print([main(arguments) for arguments in {asked}])\n"
        "print({'torch', 'transformers', 'pandas', 'datasets'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "longctx extend smollm2 smollm2-16k --method yarn:target=16384" in done.stdout
    assert done.stdout.endswith(f"{[0] * len(asked)}\nset()\n")


def test_options_of_tasks_go_to_those_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []

    def taken(command: Sweep) -> int:
        chosen[:] = command.chosen()
        return 0

    monkeypatch.setattr(Sweep, "run", taken)
    text = ["sweep", "demo", "--samples", "3", "--haystack", "grass", "--chat", "False", "--tasks"]
    assert main([*text, "passkey", "multi_key:samples=5,values=words", "perplexity"]) == 0
    given: dict[str, Any] = {"haystack": "grass", "chat": False}
    assert chosen == [
        Passkey(samples=3, **given),
        MultiKey(samples=5, values="words", **given),
        Perplexity(),
    ]
    assert main(["sweep", "demo", "--tasks", "repetition", "--no-ignore-eos"]) == 0
    assert chosen == [Repetition(ignore_eos=False)]
    assert main(["sweep", "demo", "--tasks", "lines", "--depths", "None"]) == 0
    assert chosen == [Lines(depths=None)]
    assert main(["sweep", "demo", "--tasks", "perplexity", "--text", "a", "b"]) == 0
    assert chosen == [Perplexity(text=("a", "b"))]
    assert main(["sweep", "demo"]) == 0
    assert chosen == [Passkey(), Perplexity()]


def test_a_reader_that_goes_away_loses_no_work(tmp_path: Path) -> None:
    """`longctx … | true`: the pipe is closed before anything is printed."""
    commands = {
        "extended/config.json": ["extend", "demo", "extended", "--method", "yarn:4"],
        "swept/sweep.json": ["sweep", "demo", "--lengths", "256", "--tasks", "perplexity",
                             "--windows", "1", "--out", "swept"],
    }  # fmt: skip
    for made, command in commands.items():
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "longctx", *command],
            cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(writer)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / made).exists()
        assert "Traceback" not in done.stderr
        assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("passkey:wording=x", "wording='x': expected Wording"),
        ("needle:question='What, where?',answer='x',needle='x is here'", "does not exist"),
    ],
)
def test_fields_of_a_task_are_of_their_types(
    value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "./nowhere", "--tasks", value]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("length", ["16777217", "999999999999", "9" * 5000])
def test_lengths_beyond_reason_are_refused(length: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "./nowhere", "--lengths", length]) == 2
    assert "is beyond reason" in capsys.readouterr().err
