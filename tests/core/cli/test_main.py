"""The command line: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import longctx
from longctx.checkpoint import save
from longctx.cli.main import main

from ...families import build
from ...test_matrix import demo_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(build("llama"), demo_tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in longctx.available())


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


def test_convert_copies_the_embedded_model(tmp_path: Path) -> None:
    assert main(["convert", "demo", str(tmp_path / "tiny")]) == 0
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
        (["sweep", "{base}", "--methods", "yran", "--out", "{out}"], "did you mean 'yarn'"),
        (["sweep", "{base}", "--lengths", "4x", "--out", "{out}"], "'4x' is not a length"),
        (["sweep", "demo", "--lengths", "20", "--out", "{out}"], "too short"),
        (["sweep", "demo", "--lengths", "20", "--out", "{out}"], "task passkey: length=20"),
        (
            ["sweep", "demo", "--tasks", "perplexity", "--verify", "20", "--out", "{out}"],
            "--verify is for the tasks passkey, multi_key",
        ),
        (
            ["sweep", "demo", "--tasks", "passkey", "--stride", "8", "--out", "{out}"],
            "--stride is for the tasks perplexity",
        ),
        (
            ["sweep", "demo", "--tasks", "lines", "--haystack", "grass", "--out", "{out}"],
            "--haystack is for the tasks passkey, multi_key",
        ),
        (
            ["sweep", "demo", "--tasks", "lines", "--lines-file", "x", "--share-lengths"],
            "--share-lengths is for prompts that are drawn",
        ),
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


def test_help_is_quick_and_shows_examples() -> None:
    """The heavy libraries are not imported for it."""
    code = (
        "import sys\nfrom longctx.cli.main import main\n"
        "try:\n    main(['extend', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "longctx extend smollm2 smollm2-16k --method yarn:target=16384" in done.stdout
    assert done.stdout.strip().endswith("False False")
