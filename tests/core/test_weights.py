"""Weights: safetensors inside the folder, all that the model has and no more, or a refusal."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM

import longctx.eval
from longctx.checkpoint import load, load_tokenizer, save
from longctx.errors import ModelError
from longctx.eval import Perplexity
from longctx.gguf import convert_gguf
from longctx.train.recipes import EMBEDDED
from longctx.train.run import Run

from ..families import build, tokens
from ..test_matrix import demo_tokenizer

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(build("llama"), demo_tokenizer(), tmp_path / "m")
    return tmp_path / "m"


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def index(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not Path(name).is_absolute():
        save_file(weights, folder / name, metadata={"format": "pt"})
    text = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda w: w.pop(Q), f"1 missing: {Q}"),
        (lambda w: w.update({Q[:-6] + "bias": torch.ones(64)}), "1 unknown to the model: model"),
        (lambda w: w.update({Q: torch.ones(3, 64)}), r"1 of another shape: .*is \[3, 64\]"),
        (lambda w: w.pop("lm_head.weight"), "1 missing: lm_head.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, edit: Any, said: str) -> None:
    change(folder, edit)
    with pytest.raises(ModelError, match=said):
        load(folder, device="cpu")


def test_copies_of_what_is_computed_are_passed_over(folder: Path) -> None:
    wanted = load(folder, device="cpu")[0](tokens(20)).logits
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # of transformers 4.30
    change(folder, lambda w: w.update(old))
    assert torch.equal(load(folder, device="cpu")[0](tokens(20)).logits, wanted)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    save(build("llama", tie_word_embeddings=True), demo_tokenizer(), tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    load(tmp_path / "m", device="cpu")


@pytest.mark.parametrize("name", ["w.bin", "../w.safetensors", "sub/../../w.safetensors", "ABS"])
def test_an_index_names_safetensors_inside_the_folder_alone(folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    index(folder, name.replace("ABS", str(folder.parent / "x.safetensors")))
    with pytest.raises(ModelError, match=r"cannot load .*inside the checkpoint's folder alone"):
        load(folder, device="cpu")
    config(folder, transformers_weights=name)
    with pytest.raises(ModelError, match=r"cannot load .*inside the checkpoint's folder alone"):
        load(folder, device="cpu")


def test_whole_shards_are_read(folder: Path) -> None:
    index(folder, "model-00001-of-00001.safetensors")
    load(folder, device="cpu")
    (folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no file model-00001-of-00001"):
        load(folder, device="cpu")


def test_links_out_of_the_folder_are_refused_but_for_the_hubs_cache(folder: Path) -> None:
    blobs = folder.parent / "models--a--b" / "blobs"
    snapshot = folder.parent / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    (snapshot / "model.safetensors").rename(blobs / "4567")
    (snapshot / "model.safetensors").symlink_to("../../blobs/4567")
    load(snapshot, device="cpu")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(blobs / "4567")
    with pytest.raises(ModelError, match=r"is a link to .*4567, outside"):
        load(folder, device="cpu")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json: .* Fetch or convert"):
        load(folder, device="cpu")


def test_an_adapter_is_named_with_or_without_its_base(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelError, match=r"adapter_config\.json.*Merge it"):
        load(folder, device="cpu")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter_config\.json.*Merge it"):
        load(folder, device="cpu")


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_the_argument_chooses_attention_not_the_config(folder: Path, key: str) -> None:
    config(folder, **{key: "eager"})
    for attn, wanted in (("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
        model, _ = load(folder, device="cpu", attn=attn)  # pyright: ignore[reportArgumentType]
        assert vars(model.config)["_attn_implementation_internal"] == wanted


def _gemma2() -> Any:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=1024, **small, **heads))  # pyright: ignore[reportArgumentType]


def _bloom() -> Any:
    return BloomForCausalLM(BloomConfig(vocab_size=1024, hidden_size=32, n_layer=2, n_head=2))


@pytest.mark.parametrize("make", [_gemma2, _bloom])
def test_families_without_sdpa_run_by_eager_and_say_so(
    make: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make().eval()
    save(model, demo_tokenizer(), tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        again, _ = load(tmp_path / "m", device="cpu")
    assert f"{model.config.model_type!r} has no SDPA" in caplog.text
    assert torch.allclose(again(tokens(20)).logits, model(tokens(20)).logits, atol=1e-5)
    with pytest.raises(ModelError, match="cannot load"):
        load(tmp_path / "m", device="cpu", attn="sdpa")


def test_a_tokenizer_beyond_the_embeddings_is_told_and_not_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(build("llama"), load_tokenizer("demo"), tmp_path / "m")
    model, tokenizer = load(tmp_path / "m", device="cpu")
    assert "ids up to 1,023 and the model 96 embeddings: 928 tokens" in caplog.text
    with pytest.raises(ModelError, match=r"928 tokens, from .* cannot be read"):
        longctx.eval.sweep(model, tokenizer, [Perplexity(windows=1)], "64")
    with pytest.raises(ModelError, match=r"928 tokens, from .* cannot be read"):
        Run(EMBEDDED, ("sample",), tmp_path / "run").start(model, tokenizer)


def _write_gguf(path: Path) -> None:
    """A Llama of one layer with the demo's tokenizer."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "llama")
    for name, value in {
        "context_length": 64, "embedding_length": 32, "block_count": 1, "head_count": 2,
        "feed_forward_length": 32, "vocab_size": 1024, "head_count_kv": 2,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-6)
    tokenizer: Any = load_tokenizer("demo")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_merges([" ".join(pair) for pair in rules["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (1024, 32), "output_norm": (32,), "output": (1024, 32)}
    shapes |= {f"blk.0.{n}": (32, 32) for n in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{n}": (32, 32) for n in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{n}": (32,) for n in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _embeddings(path: Path) -> int:
    return load(path, device="cpu")[0].get_input_embeddings().weight.shape[0]  # pyright: ignore


def test_of_several_who_first_load_a_gguf_one_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGCTX_CACHE", str(tmp_path / "cache"))
    _write_gguf(tmp_path / "tiny.gguf")
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(convert_gguf, [tmp_path / "tiny.gguf"] * 3)) == {
            next((tmp_path / "cache" / "gguf").glob("[0-9a-f]*"))
        }


def test_nothing_beside_a_gguf_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGCTX_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "m"
    home.mkdir()
    _write_gguf(home / "tiny.gguf")
    code = "open(__import__('os').environ['LONGCTX_CACHE'] + '-run', 'w')"
    (home / "evil.py").write_text(code)
    auto = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", None]}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (home / name).write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (home / "adapter_config.json").write_text("{")
    assert _embeddings(home / "tiny.gguf") == 1024
    assert _embeddings(home) == 1024
    assert not os.path.lexists(str(tmp_path / "cache") + "-run")
