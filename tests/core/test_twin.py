"""What a family derives from its config follows a patch, and what is saved is compared with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import longctx
from longctx.checkpoint import load_tokenizer
from longctx.errors import ModelError
from longctx.model import unwrapped
from longctx.scoring.token_scores import score
from longctx.train.engine.lora import Lora, add_lora
from longctx.twin import build_twin, differences

from ..families import WINDOW, build, tokens
from .test_proof import SMALL, made

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": WINDOW,
}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}


def deepseek(**rope: Any) -> PreTrainedModel:
    """It scales the softmax by `mscale_all_dim`, once, when it is built."""
    settings = {
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, **rope},
        "max_position_embeddings": 4 * WINDOW,
    }
    return made(
        transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config, **DEEPSEEK | settings
    )


def ministral() -> PreTrainedModel:
    """Its attention reads `llama_4_scaling_beta` beside the rotary."""
    settings = {
        "head_dim": 16,
        "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1},
        "max_position_embeddings": 4 * WINDOW,
        "sliding_window": None,
    }
    return made(transformers.Ministral3ForCausalLM, transformers.Ministral3Config, **settings)


def gpt_oss() -> PreTrainedModel:
    """Its yarn keeps parts of planes."""
    settings = {
        "head_dim": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 24,
        "rope_parameters": {**YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        "max_position_embeddings": 4 * WINDOW,
    }
    return made(transformers.GptOssForCausalLM, transformers.GptOssConfig, **settings)


@pytest.mark.parametrize("family", [deepseek, ministral, gpt_oss])
def test_the_same_yarn_in_place_of_its_own_changes_no_bit(family: Any) -> None:
    model, ids = family(), tokens(150)
    before = model(ids).logits
    longctx.extend(model, "yarn:4", replace=True)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", [deepseek, ministral])
@pytest.mark.parametrize("method", ["yarn:8", "linear:8", "longrope"])
def test_a_plain_reload_agrees_where_attention_is_scaled_too(
    family: Any, method: str, tmp_path: Path
) -> None:
    model, ids = family(), tokens(150)
    before = model(ids).logits
    if method == "longrope":
        pairs = [1.0 + 0.1 * plane for plane in range(8)]
        patch = longctx.extend(model, "longrope", replace=True, divisors=pairs, factor=8)
    else:
        patch = longctx.extend(model, method, replace=True)
    here = model(ids).logits
    assert longctx.save(model, load_tokenizer("demo"), tmp_path / "out").plain
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(plain(ids).logits, here, rtol=0, atol=1e-4)
    again, _ = longctx.load(tmp_path / "out", device="cpu", attn="eager")
    for one, logits in ((patch, before), (longctx.patch_of(again), before)):
        assert one is not None
        one.remove()
        torch.testing.assert_close(one.model(ids).logits, logits, rtol=0, atol=1e-4)


def test_entries_of_several_dimensions_are_carried_over(tmp_path: Path) -> None:
    mrope = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**SMALL, "head_dim": 16, "rope_parameters": {"rope_theta": 1e4, **mrope}}
    config = transformers.Qwen3VLConfig(
        text_config=text,  # pyright: ignore[reportArgumentType]
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}  # pyright: ignore[reportArgumentType]
        | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    )
    torch.manual_seed(0)
    model, ids = transformers.Qwen3VLForConditionalGeneration(config).eval(), tokens(100)
    longctx.extend(model, "yarn:4")
    assert mrope.items() <= model.config.get_text_config().rope_parameters.items()
    assert longctx.save(model, load_tokenizer("demo"), tmp_path / "out").plain
    plain = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)


def test_save_says_what_the_config_cannot_say(tmp_path: Path) -> None:
    model = build("llama")
    model.model.layers[1].self_attn.scaling *= 1.1
    with pytest.warns(UserWarning, match=r"layers\.1\.self_attn\.scaling is 0\.275"):
        saved = longctx.save(model, load_tokenizer("demo"), tmp_path / "out")
    assert not saved.plain


def test_a_twin_has_real_buffers_and_no_weights() -> None:
    model = build("gemma3")
    twin = build_twin(model, model.config)
    assert all(parameter.is_meta for parameter in twin.parameters())
    assert differences(model, twin) == []
    model.model.rotary_emb.full_attention_inv_freq *= 2
    assert "full_attention_inv_freq" in differences(model, twin)[0]


def test_further_names_of_the_window_follow(tmp_path: Path) -> None:
    model, tokenizer = longctx.load("demo", device="cpu")
    model.config.max_sequence_length = model.config.n_ctx = 256
    model.config.seq_length = 100  # something else than the window
    model.generation_config.max_length = 256
    patch = longctx.extend(model, "yarn:4")
    longctx.save(model, tokenizer, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["max_sequence_length"] == written["n_ctx"] == 1024
    assert written["seq_length"] == 100
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["max_length"] == 1024
    again, _ = longctx.load(tmp_path / "out", device="cpu")
    for one in (patch, longctx.patch_of(again)):
        assert one is not None
        assert one.model.config.n_ctx == 1024
        one.remove()
        assert one.model.config.n_ctx == one.model.generation_config.max_length == 256
        assert one.model.config.seq_length == 100


def test_the_base_stands_at_the_top_level_always(tmp_path: Path) -> None:
    model, tokenizer = longctx.load("demo", device="cpu")
    longctx.save(model, tokenizer, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]


class DataParallel(torch.nn.Module):
    """As torch's own: the model is its `module`."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: add_lora(model, Lora(r=2)),
        lambda model: torch.compile(model, backend="eager"),
        DataParallel,
        lambda model: DataParallel(
            cast(Any, torch.compile(add_lora(model, Lora(r=2)), backend="eager"))
        ),
    ],
    ids=["peft", "compile", "ddp", "all"],
)
def test_wrappers_are_looked_through(wrap: Any) -> None:
    model = build("llama")
    outer = wrap(model)
    assert unwrapped(outer) is model
    with longctx.extend(outer, "linear:4") as patch:
        assert longctx.patch_of(outer) is patch is longctx.patch_of(model)
        wanted = score(model, tokens(80)).nll
        assert torch.equal(score(outer, tokens(80)).nll, wanted)
    assert longctx.patch_of(outer) is None
    with pytest.raises(ModelError, match="expected a transformers model"):
        unwrapped(torch.nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_outside_of_the_model_is_refused() -> None:
    how = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    outer = peft.get_peft_model(build("llama"), how)
    with pytest.raises(ModelError, match="learns a prompt"):
        longctx.extend(outer, "linear:4")


def test_adapters_are_not_saved_as_a_model(tmp_path: Path) -> None:
    model = build("llama")
    longctx.extend(model, "yarn:4")
    outer = add_lora(model, Lora(r=2))
    for adapted in (outer, model):
        with pytest.raises(ModelError, match="merge"):
            longctx.save(adapted, load_tokenizer("demo"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
