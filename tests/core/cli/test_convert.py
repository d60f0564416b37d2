"""`longctx convert --to`: a model of other weights, and what goes through another command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import longctx
from longctx.cli.main import main
from longctx.cli.train import Train
from longctx.train.recipes import UPTRAIN

from ...families import build, tokens
from ...test_matrix import demo_tokenizer, logits


def test_a_model_of_fewer_heads_is_written_and_loads_plainly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The manual of a language that counts from zero.\n" * 100)
    given = ["convert", "demo", str(tmp_path / "out"), "--to", "multi_query:1"]
    assert main([*given, "--calibration", str(text)]) == 0
    shown = capsys.readouterr().out
    assert "cache 2,048 → 1,024 bytes per token" in shown
    assert "layer 3: heads 0,1; lost of keys" in shown
    assert "loads in plain transformers to the same logits" in shown
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    again, _ = longctx.load(tmp_path / "out")
    assert torch.equal(logits(plain.eval(), tokens(60)), logits(again, tokens(60)))
    assert main(given) == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "yarn:4"], "longctx extend MODEL OUT --method yarn"),
        (["--to", "multi_query:3"], "kv_heads=3 and the model's 2"),
        (["--to", "multi_query:heads=1"], "did you mean 'kv_heads'"),
        (["--to", "moe:1"], "experts=1: expected 2 or more"),
        (["--to", "moe:2", "--calibration", "x.txt"], "x.txt"),
        (["--calibration", "x.txt"], "--calibration is for --to"),
    ],
)
def test_what_cannot_be_is_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longctx.save(build("llama"), demo_tokenizer(), tmp_path / "base")
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "out"), *options]) == 2
    found = capsys.readouterr().err.strip().splitlines()[-1]
    assert found.startswith("longctx convert: ")
    assert said in found
    assert not (tmp_path / "out").exists()


def test_the_input_is_not_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(tmp_path / "base")
    longctx.save(build("llama"), demo_tokenizer(), base)
    assert main(["convert", base, base, "--to", "moe:2", "--overwrite"]) == 2
    assert "is or holds the input" in capsys.readouterr().err


def test_extend_names_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extend", "demo", str(tmp_path / "x"), "--method", "multi_query:1"]) == 2
    assert "longctx convert MODEL OUT --to multi_query" in capsys.readouterr().err


def test_options_of_uptraining_reach_the_recipe() -> None:
    given: dict[str, Any] = {"model": "m", "data": ("manual",), "output_dir": Path("x")}

    def taken(**options: Any) -> Any:
        return Train(**given, recipe="uptrain", **options)._recipe()  # pyright: ignore[reportPrivateUsage]

    assert taken() == UPTRAIN
    recipe = taken(distillation=0.9, trained_weights="attention", load_balance=0.01)
    assert recipe.losses.distillation.alpha == 0.9
    assert recipe.losses.load_balance.weight == 0.01
    assert recipe.trained_weights == "attention"
    assert taken(distillation=0.0).losses.distillation is None
