"""Every trap that the doctor knows is found in a config that has it, and in no sound one."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import longctx
from longctx.cli.main import main
from longctx.config_windows import WINDOW_KEYS
from longctx.doctor import Finding, examine
from longctx.errors import ModelError

from ..families import build
from ..test_matrix import demo_tokenizer, settings

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
}


def checkpoint(folder: Path, tokenizer: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text(
        json.dumps(
            {"model_type": "llama", "max_position_embeddings": 8192, "rope_theta": 1e4, **config}
        )
    )
    settings = {"eos_token": "</s>", "model_max_length": 10**30} if tokenizer is None else tokenizer
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def one(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_sound_checkpoints_have_no_findings(tmp_path: Path) -> None:
    assert examine(checkpoint(tmp_path / "plain")) == []
    assert examine(checkpoint(tmp_path / "yarn", rope_parameters=YARN)) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rope_theta": None}, None),
        ({"original_max_position_embeddings": None}, "yarn without original_max_position"),
        ({"rope_type": "my_dynamic_thing"}, "not one that transformers knows; any name with"),
        ({"factor": None}, "yarn with factor None"),
        ({"factor": 2.0}, "factor 2.0 but max_position_embeddings / original is 4"),
        ({"factor": 1e308, "original_max_position_embeddings": 1e308}, "factor 1e+308 but"),
        ({"rope_type": "dynamic"}, "it scales only past the former, so it never does"),
    ],
)
def test_rope_settings_that_fail_silently(
    tmp_path: Path, changes: dict[str, Any], what: str | None
) -> None:
    entry = {key: value for key, value in (YARN | changes).items() if value is not None}
    found = examine(checkpoint(tmp_path / "x", rope_parameters=entry))
    if what is None:  # rope_theta at the top level is where older configs keep it
        assert found == []
        return
    assert one(found).level == "problem"
    assert what in one(found).what


def test_two_settings_that_differ_are_a_problem(tmp_path: Path) -> None:
    entry = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    both = {"rope_parameters": entry, "rope_scaling": {**entry, "factor": 4.0}}
    found = [f.what for f in examine(checkpoint(tmp_path / "x", **both))]
    assert any("says otherwise than rope_parameters" in what for what in found)


def test_a_missing_base_is_a_problem(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x", rope_parameters={"rope_type": "default"})
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "no rope_theta" in one(examine(folder)).what


def test_nested_settings_are_read_per_layer_type(tmp_path: Path) -> None:
    nested = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {**YARN, "truncate": False},
    }
    found = one(examine(checkpoint(tmp_path / "x", rope_parameters=nested)))
    assert found.where == "config.json: rope_parameters.full_attention"
    assert "ignored" in found.what


def test_longrope_notes(tmp_path: Path) -> None:
    entry = YARN | {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    entry["attention_factor"] = 1.1
    levels = {f.level for f in examine(checkpoint(tmp_path / "x", rope_parameters=entry))}
    assert levels == {"note"}


@pytest.mark.parametrize(
    ("config", "tokenizer", "level", "where"),
    [
        ({}, {"eos_token": "x", "model_max_length": 2048}, "problem", "model_max_length"),
        ({}, {"model_max_length": 8192}, "note", "eos_token"),
        ({"max_position_embeddings": 8192.0}, None, "problem", "max_position_embeddings"),
        ({"sliding_window": 4096}, None, "note", "sliding_window"),
        ({"longctx": {"original": {}, "methods": [{"name": "alibi"}]}}, None, "note", "longctx"),
        ({"longctx": {"original": {}, "methods": [{"name": "p"}]}}, None, "problem", "longctx"),
    ],
)
def test_positions_tokenizer_and_record(
    tmp_path: Path, config: dict[str, Any], tokenizer: dict[str, Any] | None, level: str, where: str
) -> None:
    found = one(examine(checkpoint(tmp_path / "x", tokenizer, **config)))
    assert (found.level, where in found.where) == (level, True)


def test_a_checkpoint_without_record_is_read_without_torch(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x", rope_parameters=YARN)
    code = (
        "import sys, pathlib, longctx.doctor as d; "
        f"print(d.examine(pathlib.Path({str(folder)!r})), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


def test_weights(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x")
    (folder / "model.safetensors").unlink()
    assert one(examine(folder)).what == "no weights"
    (folder / "pytorch_model.bin").touch()
    assert "pickles" in one(examine(folder)).what
    (folder / "modeling_x.py").touch()
    assert {f.where for f in examine(folder)} == {"pytorch_model.bin", "*.py"}
    (folder / "x.gguf").touch()
    assert any("longctx convert" in f.mend for f in examine(folder))


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        examine(tmp_path)
    (tmp_path / "config.json").write_text('{"rope')
    with pytest.raises(ModelError, match="not valid JSON"):
        examine(tmp_path)


def test_a_window_that_two_methods_set_is_sound(tmp_path: Path) -> None:
    model = build("llama")
    longctx.extend(model, "yarn:2+dual_chunk:4")
    with pytest.warns(UserWarning, match="longctx.load"):
        longctx.save(model, demo_tokenizer(), tmp_path / "out")
    found = examine(tmp_path / "out")
    assert not [finding for finding in found if "rope_parameters" in finding.where]
    assert "extended by yarn and dual_chunk" in one(found).what


@pytest.mark.parametrize("name", longctx.available())
def test_what_longctx_saves_is_sound(tmp_path: Path, name: str) -> None:
    model = build("llama")
    method = settings(name)
    longctx.extend(model, method)
    with (
        nullcontext() if method.plain_loadable else pytest.warns(UserWarning, match="longctx.load")
    ):
        longctx.save(model, demo_tokenizer(), tmp_path / "out")
    assert [f for f in examine(tmp_path / "out") if f.level == "problem"] == []


@pytest.mark.parametrize("config", [{"a": 1}, {"model_type": 5}])
def test_a_config_of_no_model_is_a_problem(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = [finding for finding in examine(tmp_path) if finding.where.endswith("model_type")]
    assert [finding.level for finding in found] == ["problem"]


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}


@pytest.mark.parametrize(
    ("config", "where", "what"),
    [
        *[({key: 2048}, key, "2048 is below the window of 8192") for key in WINDOW_KEYS],
        ({"rope_condense_ratio": 8}, "rope_condense_ratio", "condensed by 8"),
        ({"rope_parameters": {**YARN, "rope_type": "su"}}, "rope_parameters", "old name"),
        ({"rope_parameters": LINEAR}, "rope_parameters", "an original window of 2048; vLLM"),
        (
            {"rope_parameters": {**LINEAR, "original_max_position_embeddings": 8192}},
            "rope_parameters",
            "(unscaled)",
        ),
        ({"rope_parameters": {**YARN, "type": "linear"}}, "rope_parameters", "against rope_type"),
        *[
            ({"rope_parameters": {**YARN, "factor": wrong}}, "rope_parameters", "with factor")
            for wrong in (0, -4, "4", True, [], 0.5, 10**400)
        ],
        *[
            ({"max_position_embeddings": wrong}, "max_position_embeddings", "no window")
            for wrong in (0, -8192, "8192", [8192], True, {}, 10**18)
        ],
        ({"num_labels": 10**9}, "num_labels", "it is 1000000000"),
        ({"rope_parameters": {**YARN, "partial_rotary_factor": 3}}, "rope_", "_rotary_factor 3"),
        *[
            ({"rope_parameters": {**LLAMA3, **wrong}}, "rope_parameters", "_freq_factor")
            for wrong in (
                {"low_freq_factor": float("nan")},
                {"high_freq_factor": -4},
                {"low_freq_factor": 4.0},
            )
        ],
        ({"rope_theta": "1e4"}, "rope_theta", "no base"),
        ({"rope_parameters": 3}, "rope_parameters", "it is 3"),
        ({"rope_parameters": {**YARN, "attention_factor": -1}}, "rope_", "attention_factor -1"),
    ],
)
def test_windows_and_factors(tmp_path: Path, config: Any, where: str, what: str) -> None:
    found = [f for f in examine(checkpoint(tmp_path / "x", **config)) if f.level == "problem"]
    assert any(where in f.where and what in f.what for f in found), found


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("generation_config.json", {"max_length": 4096}, "generation_config.json: max_length"),
        ("tokenizer.json", {"truncation": {"max_length": 512}}, "tokenizer.json: truncation"),
        ("adapter_config.json", {"peft_type": "LORA"}, "adapter_config.json"),
    ],
)
def test_files_beside_the_config(tmp_path: Path, name: str, text: Any, where: str) -> None:
    folder = checkpoint(tmp_path / "x")
    (folder / name).write_text(json.dumps(text))
    assert one(examine(folder)).where == where


def test_what_a_config_says_is_shown_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "[bold]x[/y]\x1b[31m"
    folder = checkpoint(tmp_path / "x", rope_parameters={**YARN, "rope_type": kind})
    assert main(["doctor", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "[bold]x[/y]" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("wrong", [0, -64, "64", [64]])
def test_load_refuses_windows_that_cannot_be(tmp_path: Path, wrong: Any) -> None:
    longctx.save(build("llama"), demo_tokenizer(), tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": wrong}))
    with pytest.raises(ModelError, match=r"max_position_embeddings: it is .*expected a number"):
        longctx.load(tmp_path / "x", device="cpu")


def test_load_says_what_it_assumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    longctx.save(build("llama", rope_parameters=LINEAR), demo_tokenizer(), tmp_path / "x")
    longctx.load(tmp_path / "x", device="cpu")
    assert "longctx takes it so, of an original window of 16" in caplog.text


@pytest.mark.parametrize(
    ("rope", "engine", "level", "said"),
    [
        ({}, "vllm", None, ""),
        ({"rope_type": "linear", "factor": 4.0}, "vllm", "note", "multiplies the window"),
        ({"rope_type": "dynamic", "factor": 4.0}, "llama.cpp", "problem", "one frequency for each"),
        (YARN, "sglang", "note", "not measured"),
        (YARN, "llama.cpp", "note", "as GGUF"),
        (YARN, "mlx-lm", None, ""),
        (YARN, "ctranslate2", "problem", "converts no YaRN"),
        ({"rope_type": "dynamic", "factor": 4.0}, "mlx-lm", "problem", "a base that grows"),
    ],
)
def test_what_an_engine_does_is_said_where_it_is_more_than_reading(
    rope: dict[str, Any], engine: Any, level: str | None, said: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "x", rope_parameters=rope or None)
    found = [finding for finding in examine(folder, engine) if finding.where == engine]
    assert [finding.level for finding in found] == ([level] if level else [])
    assert all(said in finding.what for finding in found)
    assert not [finding for finding in examine(folder) if finding.where == engine]
