"""vLLM serves a saved ALiBi checkpoint by longctx's plugin, to our log-probabilities.

$LONGCTX_VLLM names the Python of an environment with vLLM in it, which is only read
(benchmarks/_servers.py): `LONGCTX_VLLM=vllm/bin/python pytest -m engines`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import longctx
from benchmarks._servers import python_of, serving
from longctx.scoring.token_scores import score
from longctx.serving.clients import client_of
from longctx.serving.flags import flags_of
from longctx.serving.vllm_plugin import ARCHITECTURE

from ...families import build
from ...test_matrix import demo_tokenizer


def six_heads() -> Any:
    """A LLaMA whose slopes lie between those of four and of eight heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=384, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=64, max_position_embeddings=256,
        initializer_range=0.2, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_save_names_the_architecture_that_the_plugin_serves(tmp_path: Path) -> None:
    model = build("llama")
    longctx.extend(model, "alibi:factor=4")
    with pytest.warns(UserWarning, match="engines that go by the architecture's name refuse it"):
        longctx.save(model, demo_tokenizer(), tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURE]
    assert longctx.load(tmp_path / "x")[0].config.architectures == ["LlamaForCausalLM"]
    longctx.save(build("llama"), demo_tokenizer(), tmp_path / "y")
    config = json.loads((tmp_path / "y" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.engines
@pytest.mark.parametrize("which", ["embedded", "six heads"])
def test_log_probabilities_are_ours(which: str, tmp_path: Path) -> None:
    if python_of("vllm") is None:
        pytest.skip("LONGCTX_VLLM names no Python with vLLM")
    model, tokenizer = longctx.load("demo", device="cpu")
    model = model if which == "embedded" else six_heads()
    longctx.extend(model, "alibi:factor=4")
    with pytest.warns(UserWarning, match="cannot be said"):
        longctx.save(model, tokenizer, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    command = flags_of(tmp_path / "model", config, "vllm").commands[0]
    with serving("vllm", command) as address:
        client: Any = client_of("vllm", address, vocabulary=1024)
        for length in (256, 512, 1023):
            ids = torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(1))
            theirs = client.logprobs(ids[0].tolist(), range(1, length))
            apart = (theirs + score(model, ids).nll[0]).abs().max().item()
            print(f"{which}, {length} tokens: {apart:.1e}")
            assert apart <= 1e-3
