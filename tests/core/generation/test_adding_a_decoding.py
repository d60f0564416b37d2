"""CONTRIBUTING's example of a decoding is put into the folder, and is all that a decoding takes."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import longctx
from longctx.catalogue import entries
from longctx.cli.main import main
from longctx.errors import RunError
from longctx.generation.registry import parse_decoding

from ...families import build
from ...test_layout import ROOT
from ...test_matrix import demo_tokenizer

SECTION = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding a decoding")[2]
(FILE,) = re.findall(r"```python\n(.*?)```", SECTION.partition("\n## ")[0], re.DOTALL)


@pytest.fixture
def flat(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "flat.py"
    path.write_text(FILE)
    package = importlib.import_module("longctx.generation.decodings")
    package.__path__.append(str(tmp_path))
    entries.cache_clear()
    yield path
    package.__path__.remove(str(tmp_path))
    sys.modules.pop("longctx.generation.decodings.flat", None)
    entries.cache_clear()


def test_call_and_command_know_it(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "flat" in longctx.available_decodings()
    assert parse_decoding("flat:by=3.0,temperature=0.5").name == "flat"
    model, tokenizer = build("llama").eval(), demo_tokenizer()
    said = longctx.generate(model, tokenizer, [[5, 9]], decoding="flat", max_new_tokens=4)
    assert said == longctx.generate(model, tokenizer, [[5, 9]], max_new_tokens=4)
    assert main(["decodings", "flat"]) == 0
    assert "What logits are divided by." in capsys.readouterr().out
    assert main(["generate", "--help"]) == 0
    assert "flat" in capsys.readouterr().out


def test_a_file_that_is_not_one_says_what_it_lacks(flat: Path) -> None:
    flat.write_text(FILE.replace('= "flat"', '= "flad"'))
    with pytest.raises(RunError, match="expected 'flat'"):
        parse_decoding("flat")


def test_the_example_is_in_the_style_of_the_house(tmp_path: Path) -> None:
    path = tmp_path / "flat.py"
    path.write_text(FILE)
    settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *settings, str(path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
