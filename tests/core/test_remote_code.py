"""Checkpoints with a module beside them: transformers loads them patched, or not at all."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

import longctx
from longctx.checkpoint import load_tokenizer
from longctx.cli.main import main
from longctx.doctor import examine
from longctx.errors import ModelError
from longctx.remote_code import MODULE_FILE

from ..families import WINDOW, build, tokens
from ..test_matrix import demo_tokenizer, settings

LONG = WINDOW + 40
QUICK = (
    ("llama", "dual_chunk"), ("llama", "sink_window"), ("qwen3", "log_n"), ("gemma3", "alibi"),
)  # fmt: skip
SLOWER = [
    pytest.param(family, name, marks=pytest.mark.slow)
    for family in ("llama", "qwen3", "gemma3")
    for name in longctx.available()
    if (family, name) not in QUICK
]


@pytest.fixture(autouse=True)
def modules_in_a_folder_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies modules to, and nobody who could be asked whether to run them."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdin", io.StringIO())


def saved(out: Path, family: str = "llama", name: str = "dual_chunk") -> tuple[Any, Path]:
    """A model and the folder that it was saved to with a module."""
    model = build(family)
    longctx.extend(model, settings(name))
    done = longctx.save(model, demo_tokenizer(), out, remote_code=True)
    assert "loads with trust_remote_code=True to the same logits" in done.message
    assert not done.plain
    return model, out


def edited(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@torch.no_grad()
@pytest.mark.parametrize(("family", "name"), [*QUICK, *SLOWER])
def test_transformers_loads_it_to_the_same_logits(family: str, name: str, tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "x", family, name)
    wanted = model(tokens(LONG)).logits
    plain = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(plain(tokens(LONG)).logits, wanted)
    ours, tokenizer = longctx.load(folder, device="cpu")
    assert torch.equal(ours(tokens(LONG)).logits, wanted)
    assert type(ours) is type(plain) is type(model)
    assert ours.config.to_dict() == plain.config.to_dict()
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(folder, trust_remote_code=True))
    for loaded in (ours, plain):
        patch = longctx.patch_of(loaded)
        assert patch is not None
        patch.remove()
        assert torch.equal(loaded(tokens(LONG)).logits, build(family)(tokens(LONG)).logits)


@torch.no_grad()
def test_stacked_methods_and_precisions_come_back(tmp_path: Path) -> None:
    model = build("llama")
    longctx.extend(model, "yarn:4")
    longctx.extend(model, "log_n")
    longctx.save(model, demo_tokenizer(), tmp_path / "x", remote_code=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "x", trust_remote_code=True)
    assert torch.equal(plain(tokens(LONG)).logits, model(tokens(LONG)).logits)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "x", trust_remote_code=True, dtype=torch.bfloat16, output_loading_info=True
    )
    half, info = loaded
    assert half.dtype == torch.bfloat16
    assert not info["missing_keys"]
    assert longctx.patch_of(half) is not None


def test_a_config_alone_builds_the_patched_model(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "x")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    patch = longctx.patch_of(AutoModelForCausalLM.from_config(config, trust_remote_code=True))
    assert patch is not None
    assert patch.method == settings("dual_chunk")


def test_nothing_loads_it_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved(tmp_path / "x")
    for auto in (AutoModelForCausalLM, AutoConfig):
        for answer in (None, False):
            with pytest.raises(ValueError, match="trust_remote_code=True"):
                auto.from_pretrained(folder, trust_remote_code=answer)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    type(model).from_pretrained(folder)  # who names the family's class is warned
    assert "using a model of type `longctx` to instantiate a model of type `llama`" in caplog.text


def test_a_missing_longctx_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(tmp_path / "x")
    monkeypatch.setitem(sys.modules, "longctx.remote_code", None)
    with pytest.raises(ImportError, match=r"needs longctx.*pip install longctx-toolkit"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_longctx_runs_nothing_from_the_folder(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "x")
    (folder / MODULE_FILE).write_text("raise SystemExit('it was run')")
    assert longctx.patch_of(longctx.load(folder, device="cpu")[0]) is not None
    assert load_tokenizer(folder).pad_token_id == 0


def test_save_says_what_it_could_not_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    longctx.extend(model, settings("log_n"))

    def other(*_: object) -> None:
        """Puts nothing in place."""

    monkeypatch.setattr("longctx.remote_code.restore", other)
    with pytest.warns(UserWarning, match="is not known to load to this model's logits"):
        done = longctx.save(model, demo_tokenizer(), tmp_path / "x", remote_code=True)
    assert "the model has [LogN(" in done.message


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="for a model without a method"):
        longctx.save(build("llama"), demo_tokenizer(), tmp_path / "x", remote_code=True)
    assert not (tmp_path / "x").exists()
    _, folder = saved(tmp_path / "x")
    record = json.loads((folder / "config.json").read_text())["longctx"]
    for kind in (None, "lama", 3, [], {}):
        edited(folder, longctx={**record, "native_type": kind})
        with pytest.raises(ModelError, match="native_type: expected a model type that transf"):
            longctx.load(folder, device="cpu")
    for damaged in (None, [], "x"):
        edited(folder, longctx=damaged)
        with pytest.raises(ModelError, match="native_type: expected a model type"):
            longctx.load(folder, device="cpu")
    edited(folder, longctx={**record, "methods": []})
    with pytest.raises(ModelError, match="entry longctx: methods"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_doctor_says_who_loads_it(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "x")
    notes = {found.where: found.what for found in examine(folder)}
    assert "refuses it without" in notes["config.json: longctx"]
    assert "*.py" not in notes
    (folder / MODULE_FILE).write_text("import os")
    assert "*.py" in {found.where for found in examine(folder)}


def test_the_command_writes_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "x")
    assert main(["extend", "demo", out, "--method", "log_n", "--remote-code"]) == 0
    assert "loads with trust_remote_code=True" in capsys.readouterr().out
    again = str(tmp_path / "y")  # from a folder with a module to one without
    model, tokenizer = longctx.load(out)
    with pytest.warns(UserWarning, match="remote_code=True"):
        longctx.save(model, tokenizer, again)
    config = json.loads((tmp_path / "y" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "native_type" not in config["longctx"]
    assert not (tmp_path / "y" / MODULE_FILE).exists()
