"""Running engines give our numbers: `pytest -m engines` (see benchmarks/_servers.py)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import longctx
from benchmarks._servers import ENVIRONMENTS, python_of, serving
from benchmarks.engines import checkpoint, contradicted, measure
from longctx.serving.check import Checked, CheckSettings, check_server
from longctx.serving.clients import client_of
from longctx.serving.engines import Engine
from longctx.serving.flags import flags_of
from longctx.serving.gguf_export import export_gguf

from ...families import WINDOW, build
from ...test_matrix import settings
from .small_tokenizers import small_tokenizer

pytestmark = pytest.mark.engines
PROMPTS = CheckSettings(lengths=(WINDOW, 2 * WINDOW, 4 * WINDOW - 1), positions=8)


def need(engine: Engine) -> None:
    if python_of(engine) is None:
        pytest.skip(f"{ENVIRONMENTS[engine][0]} names no Python with {engine}")


def model_of(family: str, method: str | None, tokenizer: Any) -> Any:
    model = build(family, vocab_size=len(tokenizer))
    with torch.no_grad():  # biases begin at 0, norms at 1
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    if method is not None:
        longctx.extend(model, method if ":" in method else settings(method))
    return model


def by_llama_cpp(make: Callable[[], Any], tokenizer: Any, file: Path, window: int) -> Checked:
    need("llama.cpp")
    export_gguf(make(), tokenizer, file)
    with serving("llama.cpp", ("llama-server", "-m", str(file), "-c", str(window))) as url:
        client: Any = client_of("llama.cpp", url, vocabulary=len(tokenizer))
        return check_server(make(), tokenizer, client, PROMPTS)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("llama", name) for name in ("linear", "ntk", "ntk_by_parts", "yarn", "llama3", "abf")),
        *(
            ("llama", name)
            for name in ("longrope", "resonance", "p_rope:factor=4", "cope", "alibi:4")
        ),
        ("llama", "drop:4"),
        ("mistral", "yarn:factor=4,attention_factor=1.3"),
        ("qwen2", "yarn:4"),
        ("qwen2", "resonance"),
        ("qwen3", "linear"),
        ("qwen3", "ntk"),
        ("qwen3", "ntk_by_parts"),
        ("qwen3", "yarn:factor=4,attention_factor=1.3"),
    ],
)
def test_llama_cpp_computes_what_was_exported(family: str, method: str, tmp_path: Path) -> None:
    tokenizer = longctx.load("demo")[1]
    found = by_llama_cpp(
        lambda: model_of(family, method, tokenizer), tokenizer, tmp_path / "x.gguf", 4 * WINDOW
    )
    assert found.ok, str(found)
    assert len(found.rows) == 3
    assert any(row.between is not None and row.between > 0.1 for row in found.rows)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe", "llama", "metaspace"])
def test_llama_cpp_splits_texts_as_we_do(kind: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(kind)
    need("llama.cpp")
    export_gguf(model_of("llama", None, tokenizer), tokenizer, tmp_path / "x.gguf")
    with serving("llama.cpp", ("llama-server", "-m", str(tmp_path / "x.gguf"), "-c", "64")) as url:
        client: Any = client_of("llama.cpp", url, vocabulary=len(tokenizer))
        for text in ("It's  12345\n\n\tand I'LL é東京 ✓ ½", "", "x\r\n\r\ny  ", "a" * 50):
            assert client.tokenize(text) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("method", ["yarn:factor=4,attention_factor=1.3", "dynamic:4"])
def test_vllm_computes_what_was_saved(method: str, tmp_path: Path) -> None:
    need("vllm")
    model, tokenizer = longctx.load("demo", device="cpu", dtype="float32")
    longctx.extend(model, method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        longctx.save(model, tokenizer, tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    flags = flags_of(tmp_path / "x", config, "vllm")
    with serving("vllm", flags.commands[0]) as url:
        client: Any = client_of("vllm", url, vocabulary=1024)
        found = check_server(model, tokenizer, client, CheckSettings())
    assert found.ok, str(found)


@pytest.mark.parametrize("method", ["linear:4", "llama3:4", "yarn:4", "resonance:4", "alibi:4"])
@pytest.mark.parametrize("engine", ["mlx-lm", "ctranslate2"])
def test_a_library_does_what_is_said_of_it(engine: Engine, method: str, tmp_path: Path) -> None:
    need(engine)
    folder = checkpoint("demo", longctx.parse_method(method), tmp_path / "x")
    found = measure(engine, folder, tmp_path / "x.json")
    assert not contradicted(engine, folder, found)
