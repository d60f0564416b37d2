"""What stands in a GGUF file, held against the naive permutation and transformers' own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.cli.main import main
from longctx.errors import ModelError, RunError
from longctx.model import rope_of, rotary_of
from longctx.rope import frequencies_of
from longctx.serving.gguf_export import export_gguf
from longctx.serving.gguf_layout import layout_of
from longctx.serving.gguf_pretokenizers import cut_as_named
from longctx.serving.gguf_tokenizer import vocabulary_of

from ...families import VOCABULARY, build, tokens
from ...test_matrix import settings
from .small_tokenizers import small_tokenizer

gguf: Any = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return longctx.load("demo")[1]


def family(name: str, **changes: Any) -> Any:
    """A tiny model with the embedded tokenizer's vocabulary."""
    model = build(name, vocab_size=1024, **changes)
    with torch.no_grad():  # biases begin at 0, norms at 1
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(-0.1, 0.1, len(parameter)))
            assert parameter.isfinite().all(), key
    return model


def stored(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    found = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    return keys, found


def side_by_side(weight: Tensor, heads: int) -> Tensor:
    """Row 2i of each head is the old row i, row 2i + 1 the old i + d/2; written out."""
    made, size = torch.empty_like(weight), weight.shape[0] // heads
    for head in range(heads):
        for i in range(size // 2):
            made[head * size + 2 * i] = weight[head * size + i]
            made[head * size + 2 * i + 1] = weight[head * size + i + size // 2]
    return made


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_frequencies_are_divisors_and_rows_stand_side_by_side(
    name: str, tmp_path: Path, tokenizer: Any
) -> None:
    model = family(name)
    with longctx.extend(model, "yarn:factor=4,attention_factor=1.3"):
        found = export_gguf(model, tokenizer, tmp_path / "x.gguf")
        installed, scaling = frequencies_of(rotary_of(model), None)
        own = rope_of(model).inv_freq()
    assert (found.architecture, found.window, found.off) == ("llama", 256, 0.0)
    keys, weights = stored(tmp_path / "x.gguf")
    assert keys["llama.context_length"] == 256
    assert keys["llama.rope.scaling.attn_factor"] == pytest.approx(scaling)
    assert scaling == pytest.approx(1.3)
    assert not [key for key in keys if "scaling.type" in key]
    assert keys["llama.rope.freq_base"] == 10_000.0
    torch.testing.assert_close(
        own / weights["rope_freqs.weight"].double(), installed.double(), rtol=1e-6, atol=0
    )
    state = model.state_dict()
    attention = "model.layers.1.self_attn"
    for short, heads in (("q", 4), ("k", 2)):
        for kind in ("weight", "bias") if name == "qwen2" else ("weight",):
            wanted = side_by_side(state[f"{attention}.{short}_proj.{kind}"], heads)
            assert torch.equal(weights[f"blk.1.attn_{short}.{kind}"], wanted)
    assert torch.equal(weights["blk.1.attn_v.weight"], state[f"{attention}.v_proj.weight"])
    assert torch.equal(weights["output.weight"], state["lm_head.weight"])
    assert json.loads(keys["longctx.record"])["methods"][0]["name"] == "yarn"


@pytest.mark.parametrize(
    "name", ["linear", "ntk", "llama3", "longrope", "resonance", "cope", "drop"]
)
def test_every_static_method_goes_the_same_way(name: str, tmp_path: Path, tokenizer: Any) -> None:
    model = family("llama")
    with longctx.extend(model, settings(name)):
        export_gguf(model, tokenizer, tmp_path / "x.gguf")
        installed, _ = frequencies_of(rotary_of(model), None)
    keys, weights = stored(tmp_path / "x.gguf")
    own = keys["llama.rope.freq_base"] ** (-torch.arange(0, 16, 2).double() / 16)
    turned = own / weights.get("rope_freqs.weight", torch.ones(8)).double()
    torch.testing.assert_close(turned, installed.double(), rtol=1e-6, atol=1e-29)
    assert ("rope_freqs.weight" in weights) == (name != "ntk")  # which changes the base alone


def test_transformers_reads_the_weights_back(
    tmp_path: Path, monkeypatch: Any, tokenizer: Any
) -> None:
    """Its own reader undoes the permutation; it passes over the frequencies."""
    monkeypatch.setenv("LONGCTX_CACHE", str(tmp_path / "cache"))
    model = family("llama", tie_word_embeddings=True)
    ids = tokens(60)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    with longctx.extend(model, "linear:4"):
        export_gguf(model, tokenizer, tmp_path / "x.gguf")
    assert "output.weight" not in stored(tmp_path / "x.gguf")[1]
    read, again = longctx.load(tmp_path / "x.gguf", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids=ids).logits, wanted)
    text = "The answer is 12345, isn't it?"
    assert (
        again(text)["input_ids"] == tokenizer(text)["input_ids"] or again.bos_token_id is not None
    )


def test_an_unextended_model_has_no_divisors(tmp_path: Path, tokenizer: Any) -> None:
    export_gguf(family("llama"), tokenizer, tmp_path / "x.gguf")
    keys, weights = stored(tmp_path / "x.gguf")
    assert "rope_freqs.weight" not in weights
    assert "llama.rope.scaling.attn_factor" not in keys
    assert keys["llama.context_length"] == 64
    assert "longctx.record" not in keys


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("yarn:factor=4,attention_factor=1.3", "yarn"),
        ("ntk_by_parts:4", "yarn"),
        ("linear:4", "linear"),
        ("ntk:4", None),
    ],
)
def test_qwen3_takes_what_llama_cpp_computes_itself(
    method: str, kind: str | None, tmp_path: Path, tokenizer: Any
) -> None:
    model = family("qwen3")
    with longctx.extend(model, method):
        export_gguf(model, tokenizer, tmp_path / "x.gguf")
    keys, weights = stored(tmp_path / "x.gguf")
    assert keys["general.architecture"] == "qwen3"
    assert keys.get("qwen3.rope.scaling.type") == kind
    assert "rope_freqs.weight" not in weights
    name = "model.layers.0.self_attn.q"
    assert torch.equal(weights["blk.0.attn_q.weight"], model.state_dict()[f"{name}_proj.weight"])
    assert torch.equal(
        weights["blk.0.attn_q_norm.weight"], model.state_dict()[f"{name}_norm.weight"]
    )


def test_biases_are_written_as_refact_without_a_rotary(tmp_path: Path, tokenizer: Any) -> None:
    model = family("llama")
    with longctx.extend(model, "alibi:4"):
        found = export_gguf(model, tokenizer, tmp_path / "x.gguf")
    assert (found.architecture, found.window) == ("refact", 256)
    keys, weights = stored(tmp_path / "x.gguf")
    assert not [key for key in keys if ".rope." in key]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights["blk.0.attn_q.weight"], model.state_dict()[name])


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("llama", "dynamic:4", "dynamic turns the same token otherwise in a longer input"),
        ("llama", "rerope", "rerope: llama.cpp has no way to compute it"),
        ("llama", "dual_chunk", "dual_chunk: llama.cpp has no way"),
        ("llama", "sink_window", "sink_window: llama.cpp has no way"),
        ("llama", "log_n:kind=llama4", "log_n: llama.cpp has no way"),
        ("qwen3", "resonance:4", "llama.cpp reads no divisors of frequencies for it"),
        ("qwen3", "yarn:factor=4,beta_fast=16.0,beta_slow=2.0", "with their usual betas"),
        ("qwen3", "alibi", "has norms on its queries and keys"),
        ("qwen2", "alibi", "has no place in llama.cpp's architecture 'refact'"),
        ("gemma3", None, "longctx writes llama, mistral, qwen2, qwen3"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_by_name(
    name: str, method: str | None, said: str, tmp_path: Path, tokenizer: Any
) -> None:
    model = family(name)
    if method:
        longctx.extend(model, method)
    with pytest.raises(ModelError) as error:
        export_gguf(model, tokenizer, tmp_path / "x.gguf")
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliding_window": 24}, "sees 24 tokens back"),
        ({"hidden_act": "gelu"}, "llama.cpp computes 'silu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
    ],
)
def test_settings_that_llama_cpp_does_not_follow_are_refused(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelError) as error:
        layout_of(build("mistral", **changes))
    assert said in str(error.value)


def test_half_and_eight_bits_are_as_near_as_they_can_be(tmp_path: Path, tokenizer: Any) -> None:
    model = family("llama")
    half = export_gguf(model, tokenizer, tmp_path / "h.gguf", dtype="f16")
    eight = export_gguf(model, tokenizer, tmp_path / "q.gguf", dtype="q8_0")
    assert 0 < half.off < 5e-4 < eight.off < 5e-3
    assert eight.bytes < half.bytes
    keys, weights = stored(tmp_path / "q.gguf")
    assert keys["general.quantization_version"] == 2
    assert torch.equal(weights["output_norm.weight"], model.model.norm.weight)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight has weights up to 1e\+06"):
        export_gguf(model, tokenizer, tmp_path / "h.gguf", dtype="f16")
    with pytest.raises(ModelError, match=r"rows of 80 weights, and q8_0 blocks of 32"):
        export_gguf(
            family("llama", intermediate_size=80), tokenizer, tmp_path / "o.gguf", dtype="q8_0"
        )
    wrong: Any = "q4"
    with pytest.raises(RunError, match="expected f32, f16, q8_0"):
        export_gguf(model, tokenizer, tmp_path / "o.gguf", dtype=wrong)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe", "llama", "metaspace"])
def test_tokenizers_are_matched_by_their_settings(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    found = vocabulary_of(tokenizer, len(tokenizer) + 2)
    assert (found.model, found.pre) == (
        ("llama", "default") if kind in ("llama", "metaspace") else ("gpt2", kind)
    )
    assert found.begins
    assert not found.ends
    assert found.tokens[-1] == f"[PAD{len(tokenizer) + 1}]"
    assert found.kinds[-1] == 5
    assert found.kinds[found.special["bos"]] == 3
    assert bool(found.notes) == (kind == "metaspace")


TEXT = "In 2024, 65,536 tokens (0x10000) cost 1234567 €; it's ½ of 131072.\n\n\t٣٤ x86_64"


def named(path: Path, **keys: str | bool) -> Path:
    """A file that holds nothing but keys of a tokenizer."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gpt-2", "gpt-2"),
        ("smollm", "smollm"),
        ("smollm", "command-r"),
        ("qwen2", "qwen2"),
        ("llama-bpe", "llama-bpe"),
        ("llama-bpe", "llama-v3"),
    ],
)
def test_text_is_cut_as_the_file_names_it(kind: str, name: str, tmp_path: Path) -> None:
    wanted, read = small_tokenizer("gpt-2"), small_tokenizer("gpt-2")  # which learnt long numbers
    backend: Any = wanted.backend_tokenizer
    backend.pre_tokenizer = small_tokenizer(kind).backend_tokenizer.pre_tokenizer
    backend.model.ignore_merges = kind == "llama-bpe"
    ids = wanted(TEXT)["input_ids"]
    assert (read(TEXT)["input_ids"] == ids) == (kind == "gpt-2")
    cut_as_named(read, named(tmp_path / "x.gguf", tokenizer_pre=name, add_bos_token=True))
    assert read(TEXT)["input_ids"] == ids
    assert vocabulary_of(read, len(read)).pre == kind
    settings, written = (json.loads(t.backend_tokenizer.to_str()) for t in (read, wanted))
    assert settings["model"] == written["model"]


def test_a_text_begins_with_bos_where_llama_cpp_adds_one_unasked(tmp_path: Path) -> None:
    for kind, begins in (("llama-bpe", True), ("smollm", False)):
        read = small_tokenizer(kind)
        read.add_bos_token = False
        assert read("a b")["input_ids"][0] != read.bos_token_id
        cut_as_named(read, named(tmp_path / f"{kind}.gguf", tokenizer_pre=kind))
        assert (read("a b")["input_ids"][0] == read.bos_token_id) == begins


@pytest.mark.parametrize("keys", [{}, {"tokenizer_pre": "deepseek-llm"}])
def test_an_unknown_way_to_cut_text_is_told(keys: dict[str, Any], tmp_path: Path) -> None:
    read = small_tokenizer("gpt-2")
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre.*cut as GPT-2"):
        cut_as_named(read, named(tmp_path / "x.gguf", **keys))
    chosen = small_tokenizer("other expression")  # as transformers does for some names
    cut_as_named(chosen, named(tmp_path / "y.gguf", tokenizer_pre="tekken"))
    assert chosen(TEXT)["input_ids"] == small_tokenizer("other expression")(TEXT)["input_ids"]


def test_a_checkpoint_has_the_same_ids_after_a_file(
    tmp_path: Path, monkeypatch: Any, tokenizer: Any
) -> None:
    monkeypatch.setenv("LONGCTX_CACHE", str(tmp_path / "cache"))
    export_gguf(family("llama"), tokenizer, tmp_path / "x.gguf")
    assert stored(tmp_path / "x.gguf")[0]["tokenizer.ggml.pre"] == "smollm"
    again = longctx.load(tmp_path / "x.gguf", device="cpu")[1]
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("other expression", "its pre-tokenizer is"),
        ("prefix space", "its pre-tokenizer is"),
        ("missing merge", "which its merges leave out"),
        ("unigram", "its model is 'Unigram', not BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(kind: str, said: str) -> None:
    tokenizer = small_tokenizer(kind)
    with pytest.raises(ModelError) as error:
        vocabulary_of(tokenizer, len(tokenizer))
    assert said in str(error.value)


def test_a_tokenizer_beyond_the_embeddings_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=f"beyond the model's {VOCABULARY} embeddings"):
        export_gguf(build("llama"), tokenizer, tmp_path / "x.gguf")


def test_an_output_layer_of_its_own_is_written_whatever_the_config_says(
    tmp_path: Path, tokenizer: Any
) -> None:
    model = family("llama", tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach())
    export_gguf(model, tokenizer, tmp_path / "x.gguf")
    _, weights = stored(tmp_path / "x.gguf")
    assert torch.equal(weights["output.weight"], model.lm_head.weight)
    assert torch.equal(weights["token_embd.weight"], model.lm_head.weight / 2)


def test_a_disk_that_is_full_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any) -> None:
        self.fout[0].write(b"a part")
        raise OSError(28, "No space left on device")

    out = tmp_path / "x.gguf"
    out.write_bytes(b"before")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(RunError, match=r"No space left on device.*Make room"):
        export_gguf(family("llama"), tokenizer, out)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
        ("x.gguf", b"before")
    ]


def test_the_command_replaces_a_file_only_if_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo.gguf"
    assert main(["export-gguf", "demo", str(out), "--dtype", "f32"]) == 0
    assert "window 256 tokens, as architecture 'llama'" in capsys.readouterr().out
    assert main(["export-gguf", "demo", str(out)]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert main(["export-gguf", str(out), str(out), "--overwrite"]) == 2
    assert "is or holds the input" in capsys.readouterr().err
    assert main(["export-gguf", "demo", str(tmp_path / "demo.bin")]) == 2
    assert main(["export-gguf", "demo", str(tmp_path / "no" / "x.gguf")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["demo.gguf"]
