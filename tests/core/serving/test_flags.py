"""The command for each engine, and what the table says of each kind of checkpoint."""

from __future__ import annotations

import json
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import pytest

import longctx
from longctx.cli.main import main
from longctx.config_windows import CONVERSION
from longctx.serving.engines import (
    ENGINES,
    Change,
    Engine,
    checkpoint_of,
    reading,
    readings,
)
from longctx.serving.flags import flags_of

from ...families import WINDOW, build
from ...test_matrix import settings

CHANGES: dict[str, Change] = {
    "linear": "linear", "ntk": "none", "abf": "none", "yarn": "yarn", "ntk_by_parts": "yarn_own",
    "llama3": "llama3", "longrope": "longrope", "resonance": "longrope_own", "cope": "standing",
    "drop": "standing", "p_rope": "proportional", "dynamic": "dynamic", "alibi": "biases",
    "shifted": "none",
}  # fmt: skip
"""What each method's checkpoint is; all others are beyond any config."""


@lru_cache
def config_of(*methods: str) -> dict[str, Any]:
    """The config of a model with methods on it, as it is saved."""
    model = build("llama")
    for method in methods:
        longctx.extend(model, settings(method), prove_effect=False)
    return json.loads(model.config.to_json_string())


@pytest.mark.parametrize("name", longctx.available())
def test_every_method_has_a_place_in_the_table(name: str) -> None:
    found = checkpoint_of(config_of(name))
    assert found.change == CHANGES.get(name, "beyond")
    assert found.original == WINDOW
    assert found.methods == (name,)
    factor = getattr(settings(name), "factor", None) or 1
    assert found.window == round(WINDOW * factor)
    assert [one.engine for one in readings(found)] == [*ENGINES]


def test_the_table_has_a_sentence_for_every_change_and_engine() -> None:
    found = checkpoint_of({"model_type": "llama", "max_position_embeddings": 8})
    for change in get_args(Change):
        for engine in get_args(Engine):
            said = reading(type(found)("llama", change, 8, 8, {}), engine)
            assert said.says
            assert str(said).startswith(engine)


def test_a_temperature_of_longropes_own_is_told_apart() -> None:
    """mlx-lm takes √(1 + ln s / ln L), s-fold from L tokens, whatever the config says."""
    config = config_of("longrope")
    assert checkpoint_of(config).change == "longrope"
    config["rope_parameters"] = {**config["rope_parameters"], "attention_factor": 1.3}
    assert checkpoint_of(config).change == "longrope_own"
    del config["rope_parameters"]["attention_factor"]
    assert checkpoint_of(config).change == "longrope"


def test_biases_with_another_method_on_them_are_beyond() -> None:
    found = checkpoint_of(config_of("alibi", "log_n"))
    assert found.change == "beyond"


def test_the_length_is_always_named() -> None:
    config = config_of("linear")
    assert flags_of("a folder", config, "vllm").command == (
        "vllm serve 'a folder' --max-model-len 256"
    )
    assert "--context-length 256" in flags_of("x", config, "sglang").command
    export, serve = flags_of("runs/x", config, "llama.cpp").commands
    assert export == ("longctx", "export-gguf", "runs/x", "x.gguf")
    assert serve[:5] == ("llama-server", "-m", "x.gguf", "-c", "256")
    assert flags_of("x", config, "transformers").commands == (("transformers", "serve", "x"),)
    assert flags_of("x", config, "mlx-lm").command == "mlx_lm.server --model x"
    assert flags_of("runs/x/", config, "ctranslate2").command == (
        "ct2-transformers-converter --model runs/x/ --output_dir x-ctranslate2"
    )


def test_dynamic_needs_an_override_under_vllm() -> None:
    config = config_of("dynamic")
    words = shlex.split(flags_of("x", config, "vllm").command)
    assert words[: words.index("--hf-overrides")] == [
        "vllm",
        "serve",
        "x",
        "--max-model-len",
        "256",
    ]
    assert json.loads(words[-1]) == {
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "dynamic",
            "factor": 4.0,
            "rope_theta": 10_000.0,
            "max_trained_positions": 64,
        },
    }


@pytest.mark.parametrize(
    ("method", "engine", "code", "said"),
    [
        ("yarn", "vllm", 0, "one is left for the answer"),
        ("yarn", "sglang", 0, "not run here"),
        ("yarn", "llama.cpp", 0, "-ctk f32"),
        ("dynamic", "llama.cpp", 1, "ntk for the length"),
        ("dynamic", "transformers", 1, "a base that grows"),
        ("rerope", "vllm", 1, "longctx serve"),
        ("rerope", "llama.cpp", 1, "has no way to compute it"),
        ("alibi", "transformers", 1, "no way to compute it from a config"),
        ("alibi", "llama.cpp", 0, "reads it as longctx exports it"),
        ("yarn", "mlx-lm", 0, "no window is enforced"),
        ("resonance", "mlx-lm", 1, "a temperature of its own"),
        ("alibi", "mlx-lm", 1, "computes the unextended model"),
        ("linear", "ctranslate2", 0, "a library and not a server"),
        ("llama3", "ctranslate2", 1, "computes the unextended model"),
        ("yarn", "ctranslate2", 1, "converts no YaRN"),
    ],
)
def test_the_command_prints_it_or_says_why_not(
    method: str, engine: str, code: int, said: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "x").mkdir()
    (tmp_path / "x/config.json").write_text(json.dumps(config_of(method)))
    assert main(["serve-flags", str(tmp_path / "x"), "--engine", engine]) == code
    out, err = capsys.readouterr()
    assert bool(out) == (code == 0)
    assert said in err


def test_a_checkpoint_without_a_window_or_with_an_impossible_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    for config, code, said in (
        ({"model_type": "llama"}, 1, "names no window"),
        ({"model_type": "llama", "max_position_embeddings": -3}, 2, "which is no window"),
        (
            {"model_type": "llama", "max_position_embeddings": 8, "longctx": {"methods": [{}]}},
            0,
            "",
        ),
    ):
        path.write_text(json.dumps(config))
        assert main(["serve-flags", str(tmp_path), "--engine", "vllm"]) == code
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        {"longctx": {"original": "x", "methods": 3}},
        {"longctx": {"original": {"max_position_embeddings": []}, "methods": [{"name": {}}]}},
        {"rope_parameters": {"rope_type": ["yarn"], "factor": "4"}},
        {"rope_parameters": {"rope_type": "longrope", "long_factor": [1, "x"]}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "x"}},
        {"text_config": {"rope_scaling": 3}},
    ],
)
def test_whatever_a_config_holds_is_read(config: dict[str, Any]) -> None:
    found = checkpoint_of({"model_type": "llama", "max_position_embeddings": 64, **config})
    assert len(readings(found)) == len(ENGINES)


def test_a_module_beside_a_checkpoint_serves_transformers_alone(tmp_path: Path) -> None:
    model, tokenizer = longctx.load("demo")
    with longctx.extend(model, "dual_chunk", factor=2):
        longctx.save(model, tokenizer, tmp_path / "coded", remote_code=True)
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    assert flags_of("coded", config, "transformers").command.endswith("--trust-remote-code")
    assert not flags_of("coded", config, "vllm").commands
    assert "remote_code" in flags_of("coded", config, "vllm").notes[0]


def test_a_conversion_that_no_class_says_is_served_by_longctx_alone() -> None:
    config = {"model_type": "llama", "max_position_embeddings": 256, CONVERSION: {"version": 1}}
    for engine in ENGINES:
        found = flags_of("linear", config, engine)
        assert not found.commands
        assert "longctx serve" in found.notes[0]
