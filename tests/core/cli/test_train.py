"""`longctx train` and `longctx inspect`: a run from the shell, and what is refused on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longctx.cli.main import main
from longctx.cli.train import Train
from longctx.train.loss.long_ce import LongCE
from longctx.train.recipes import LONGLORA, YARN_POSE

SCHEDULE = ["--method", "linear:2", "--positions", "schedule"]
CHAT = {
    "conversations": [
        {"from": "human", "value": "What is a passkey?"},
        {"from": "gpt", "value": "A number hidden in a long text."},
    ]
}


def chats(path: Path, *records: dict[str, Any]) -> str:
    path.write_text(json.dumps(list(records)))
    return str(path)


def command(tmp_path: Path, *more: str, data: str | None = None) -> list[str]:
    data = data or chats(tmp_path / "chats.json", *[CHAT] * 4)
    return [
        *("train", "demo", "--data", data, "--output-dir", str(tmp_path / "run")),
        *("--template", "vicuna", "--max-length", "512", "--max-steps", "2", "--evaluate", *more),
    ]


def test_a_run_from_the_shell_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--method", "yarn:2")) == 0
    said = capsys.readouterr().out
    assert "Yarn(factor=2" in said
    assert "4 conversations → 4 samples" in said
    assert "loads in plain transformers to the same logits" in said
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.max_position_embeddings == 512
    assert torch.isfinite(model(input_ids=torch.arange(9)[None]).logits).all()
    # The same again is refused, and the run is finished.
    for more in ([], ["--resume"], ["--dry-run"]):
        assert main(command(tmp_path, "--method", "yarn:2", *more)) == 2
        assert "is finished" in capsys.readouterr().err
    # It answers in the template that it learnt.
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    asked = [{"role": "user", "content": "What?"}]
    said = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert said.endswith("USER: What? ASSISTANT:")


def test_evaluation_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(tmp_path, "passkey", "--samples", "2", "--method", "linear:2")
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "passkey@256: " in said
    assert "passkey@512: " in said


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--method", "linear:2", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "supervised" in said
    assert "2 updates of 1 rows; 1 rows a pass" in said
    assert not (tmp_path / "run").exists()


def test_a_recipe_gives_what_is_left_out() -> None:
    given: dict[str, Any] = {"model": "demo", "data": ("x",), "output_dir": Path("out")}
    assert Train(**given, recipe="yarn-pose")._recipe() == YARN_POSE  # pyright: ignore[reportPrivateUsage]
    changed = Train(**given, recipe="longlora", lora_r=32, max_steps=7, no_pack=True)
    recipe = changed._recipe()  # pyright: ignore[reportPrivateUsage]
    assert recipe.lora is not None
    assert LONGLORA.lora is not None
    assert (recipe.lora.r, recipe.lora.alpha) == (32, LONGLORA.lora.alpha)
    assert recipe.training.max_steps == 7
    assert recipe.shifted
    assert not recipe.pack
    weighed = Train(**given, long_ce=2048, long_ce_gamma=3.0)._recipe()  # pyright: ignore[reportPrivateUsage]
    assert weighed.losses.long_ce == LongCE(2048, gamma=3.0)
    without = Train(**given, recipe="longlora", lora_r=0)._recipe()  # pyright: ignore[reportPrivateUsage]
    assert without.lora is None


def empty(path: Path) -> str:
    path.write_text("")
    return str(path)


def latin(path: Path) -> str:
    path.write_bytes(json.dumps([CHAT]).encode().replace(b"hidden", b"h\xe9dden"))
    return str(path)


def mixed(path: Path) -> str:
    return chats(path, CHAT, {"messages": [{"role": "user", "content": "Hi"}]})


def silent(path: Path) -> str:
    return chats(path, {"conversations": CHAT["conversations"][:1]})


def huge(path: Path) -> str:
    turns = [CHAT["conversations"][0], {"from": "gpt", "value": "word " * 80_000}]
    return chats(path, {"conversations": turns})


def cut_off(path: Path) -> str:
    path.write_text(json.dumps([CHAT, CHAT])[:-40])
    return str(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (empty, "holds no records"),
        (latin, "is not UTF-8 text at byte"),
        (mixed, "record 2"),
        (silent, "no sample is left to train on"),
        (huge, "no sample is left to train on"),
        (cut_off, "breaks off: after 1 whole records"),
    ],
)
def test_data_that_cannot_be_learnt_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], str], says: str
) -> None:
    data = make(tmp_path / "bad.json")
    assert main(command(tmp_path, "--method", "linear:2", data=data)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--method", "linear:1.5"], "max_length=512 is beyond the 384 tokens"),
        (["--method", "none"], "max_length=512 is beyond the 256 tokens"),
        (["--method", "lineal:2"], "did you mean 'linear'"),
        (["--method", "linear:2", "--norms"], "norms without adapters: pass --lora-r too"),
        (["--method", "linear:2", "--retrieval", "1.5"], "retrieval=1.5: expected a share"),
        (["--method", "linear:2", "--batch-size", "0"], "--batch-size 0: expected 1 or more"),
        ([*SCHEDULE, "--window", "64", "--no-pack"], "leave packing on"),
        (SCHEDULE, "window=2,048 (--window): expected 2 to max_length=512 tokens"),
        (["--method", "linear:2", "--window", "64"], "--window is for --positions schedule"),
        (["--method", "linear:2", "--lora-r", "0", "--norms"], "--lora-r 0 trains all"),
        (
            ["--method", "linear:2", "--lora-r", "4", "--lora-target-modules", "no"],
            "no linear layer",
        ),
        (["--method", "linear:2", "--warn"], "--warn is for --gate"),
        (["--method", "linear:2", "--long-ce-step", "9"], "are for --long-ce: pass it too"),
        (["--method", "linear:2", "--long-ce", "512"], "documents of up to 512"),
        (["--method", "linear:2", "--gate", "0.1"], "--gate goes by perplexity: add it"),
        (["--method", "linear:2", "--seed", "-1"], "--seed -1: expected"),
        (["--method", "linear:2", "--weight-decay", "-1"], "--weight-decay -1.0: expected 0 or"),
        (["--method", "linear:2", "--learning-rate", "inf"], "--learning-rate inf: expected"),
        (["--method", "linear:2", "--optimizer", "adamw_torhc"], "did you mean 'adamw_torch"),
        (["--method", "linear:2", "--report-to", "nope"], "no such tracker is installed"),
        (["--method", "dynamic:4"], "dynamic changes nothing within the 256 tokens"),
        (["--method", "dynamic:2+log_n"], "dynamic changes nothing within the 256"),
        (["--method", "yarn:2+logn"], "'logn' in 'yarn:2+logn': unknown method 'logn'; did you"),
        (["--method", "yarn:2+ntk:2"], "'ntk:2' in 'yarn:2+ntk:2': yarn holds the rotary slot"),
        (["--method", "alibi", "--shifted"], "shifted"),
        (["--method", "linear:2", "--best"], "pass evaluate_every"),
        (["--method", "linear:2", "--cp", "2"], "context parallel (2) and packing"),
        (["--method", "alibi", "--cp", "2", "--no-pack"], "context parallel (2) and alibi"),
    ],
)
def test_settings_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    tasks = ["passkey"] if "--best" in more else []
    for dry in ([], ["--dry-run"]):
        assert main(command(tmp_path, *tasks, *more, *dry)) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_template_asks_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(tmp_path, "--method", "linear:2")
    del arguments[arguments.index("--template") : arguments.index("--template") + 2]
    assert main(arguments) == 2
    assert "vicuna" in capsys.readouterr().err


def test_inspect_shows_what_is_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = chats(tmp_path / "chats.json", CHAT)
    assert main(["inspect", data, "demo", "--template", "vicuna"]) == 0
    said = capsys.readouterr().out
    assert "⟦A number hidden in a long text." in said.replace("⟦ ", "⟦")
    assert "1 conversations → 1 samples" in said
    assert main(["inspect", data, "demo", "--template", "vicuna", "--count", "0"]) == 2
    assert "--count 0: expected 1 or more" in capsys.readouterr().err
