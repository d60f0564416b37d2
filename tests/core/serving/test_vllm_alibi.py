"""vLLM serves a saved ALiBi checkpoint by longctx's plugin, to our log-probabilities.

$LONGCTX_VLLM names the Python of an environment with vLLM in it, which is only read; longctx is
put on its path for the server alone: `LONGCTX_VLLM=vllm/bin/python pytest -m engines`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import longctx
from longctx.scoring.token_scores import score
from longctx.serving.server import bound_socket
from longctx.serving.vllm_plugin import ARCHITECTURE

from ...families import build
from ...test_matrix import demo_tokenizer

PATIENCE = 1800  # seconds until vLLM is up, on busy cores too
ROOT = Path(__file__).parents[3]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def six_heads() -> Any:
    """A LLaMA whose slopes lie between those of four and of eight heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=384, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=64, max_position_embeddings=256,
        initializer_range=0.2, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def environment(folder: Path) -> dict[str, str]:
    """Variables under which a Python finds longctx and its entry points, and writes nothing."""
    info = folder / "longctx_toolkit-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: longctx-toolkit\nVersion: 0\n")
    lines = ["[vllm.general_plugins]"]
    points: dict[str, str] = PROJECT["entry-points"]["vllm.general_plugins"]
    lines += [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (folder / "longctx").symlink_to(ROOT / "longctx")
    return {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


@contextmanager
def vllm(model: Path, folder: Path, *options: str) -> Generator[str]:
    """A running server's address."""
    python = os.environ.get("LONGCTX_VLLM")
    if not python:
        pytest.skip("LONGCTX_VLLM names no Python with vLLM")
    with bound_socket("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-num-seqs", "2", "--served-model-name", "x", *options,
    ]  # fmt: skip
    log = folder / "vllm.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env=environment(folder / "path"),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except urllib.error.URLError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its engine is a process of its own
        process.wait()


def test_save_names_the_architecture_that_the_plugin_serves(tmp_path: Path) -> None:
    model = build("llama")
    longctx.extend(model, "alibi:factor=4")
    with pytest.warns(UserWarning, match="engines that do not know the method refuse it"):
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
    model, tokenizer = longctx.load("demo", device="cpu")
    model = model if which == "embedded" else six_heads()
    longctx.extend(model, "alibi:factor=4")
    with pytest.warns(UserWarning, match="cannot be said"):
        longctx.save(model, tokenizer, tmp_path / "model")
    with vllm(tmp_path / "model", tmp_path) as address:
        for length in (256, 512, 1023):
            ids = torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(1))
            asked = {"model": "x", "prompt": ids[0].tolist(), "max_tokens": 1, "prompt_logprobs": 0}
            request = urllib.request.Request(
                f"{address}/v1/completions",
                json.dumps(asked).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request) as answer:
                listed: Any = json.load(answer)["choices"][0]["prompt_logprobs"]
            pairs = zip(listed[1:], ids[0, 1:].tolist(), strict=True)
            theirs = torch.tensor([entry[str(token)]["logprob"] for entry, token in pairs])
            apart = (theirs + score(model, ids).nll[0]).abs().max().item()
            print(f"{which}, {length} tokens: {apart:.1e}")
            assert apart <= 1e-3
