"""Scores against full logits in float64, against `generate`, and against what must be refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from longctx.errors import DataError, ModelError
from longctx.scoring.token_scores import score

from ...families import VOCABULARY, build, tokens

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = GPT2Config(
    vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=1, n_head=4, initializer_range=0.2,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
OPT = OPTConfig(
    vocab_size=VOCABULARY, hidden_size=64, ffn_dim=96, num_hidden_layers=1, init_std=0.2,
    num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64,
)  # fmt: skip


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    match family:
        case "gemma2":  # tanh(logits / 3) · 3
            config = Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=3.0)
            return Gemma2ForCausalLM(config).eval()
        case "cohere":  # logits · 0.0625
            return CohereForCausalLM(CohereConfig(**SMALL)).eval()
        case "granite":  # logits / 8
            return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)).eval()
        case "gpt2":
            return GPT2LMHeadModel(GPT2).eval()
        case "opt":  # its forward reaches past the base model
            return OPTForCausalLM(OPT).eval()
        case "mamba":
            config = MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1)
            return MambaForCausalLM(config).eval()
        case _:
            return build(family)


def full(model: Any, ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """NLL in float64 and argmax from the whole logits."""
    with torch.no_grad():
        log_p = model(ids).logits[:, start - 1 : -1].double().log_softmax(-1)
    return -log_p.gather(-1, ids[:, start:, None]).squeeze(-1), log_p.argmax(-1)


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "gemma3", "phi3", "gemma2", "cohere", "granite", "gpt2", "opt", "mamba"],
)
def test_scores_are_those_of_the_full_logits(family: str) -> None:
    model, ids = model_of(family), tokens(50, batch=2)
    nll, argmax = full(model, ids, start=7)
    scores = score(model, ids, start=7, chunk=16)
    torch.testing.assert_close(scores.nll.double(), nll, rtol=1e-5, atol=2e-6)
    assert torch.equal(scores.argmax, argmax)
    assert torch.equal(scores.targets, ids[:, 7:])
    assert scores.valid.all()
    assert torch.equal(scores.correct, argmax == ids[:, 7:])


def test_the_chunk_changes_nothing_and_start_selects() -> None:
    model, ids = build("llama"), tokens(40, batch=3)
    whole = score(model, ids)
    assert whole.nll.shape == (3, 39)
    for chunk in (1, 13, 1000):
        torch.testing.assert_close(score(model, ids, chunk=chunk).nll, whole.nll)
    torch.testing.assert_close(score(model, ids, start=39).nll, whole.nll[:, -1:])


def test_a_bfloat16_head_is_projected_in_float32() -> None:
    model, ids = build("llama").to(torch.bfloat16), tokens(60)
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[:, :-1].double()
    log_p = (states @ model.lm_head.weight.double().T).log_softmax(-1)
    exact = -log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    rounded, argmax = full(model, ids, start=1)
    scores = score(model, ids)
    assert (scores.nll - exact).abs().max() < 1e-5
    assert (rounded - exact).abs().max() > 1e-3, "the model's own logits are bfloat16"
    assert torch.equal(scores.argmax, argmax)


def test_teacher_forced_argmax_is_greedy_decoding() -> None:
    model = build("llama")
    model.generation_config.eos_token_id = None  # let it go on to the end
    for seed in range(20):
        out = model.generate(tokens(30, seed=seed), max_new_tokens=6, do_sample=False)
        assert score(model, out, start=30).correct.all()
        out[0, 32] = (out[0, 32] + 1) % VOCABULARY
        assert score(model, out, start=30).correct[0].tolist()[:3] == [True, True, False]


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_never_whole(dtype: torch.dtype) -> None:
    model, ids = build("llama", vocab_size=5000).to(dtype), tokens(300)
    score(model, ids[:, :20])  # the head path is verified once
    with Largest() as largest:
        score(model, ids, chunk=20)
    assert largest.numel <= max(20 * 5000, 5000 * 64)


def test_left_and_right_padding_change_nothing_and_are_marked() -> None:
    for family in ("llama", "gpt2"):
        model, ids = model_of(family), tokens(30)
        alone = score(model, ids).nll
        nothing = torch.zeros(1, 9, dtype=torch.long)
        for left in (True, False):
            padded = torch.cat([nothing, ids] if left else [ids, nothing], dim=1)
            scores = score(model, padded, attention_mask=(padded != 0).long())
            assert scores.valid.sum() == 29
            torch.testing.assert_close(scores.nll[scores.valid], alone[0], rtol=1e-4, atol=1e-4)
            assert not scores.correct[~scores.valid].any()


def test_nan_is_reported_as_nan() -> None:
    model, ids = build("llama"), tokens(20)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    scores = score(model, ids)
    assert scores.nll.isnan().all()
    assert (scores.argmax == -1).all()


def test_the_model_is_left_as_it_was() -> None:
    model, ids = build("llama").to(torch.bfloat16), tokens(20)
    model.train()
    model.model.layers[0].eval()
    before = model(ids).logits
    score(model, ids)
    assert model.training
    assert not model.model.layers[0].training
    assert not {"forward"} & (vars(model.model).keys() | vars(model.lm_head).keys())
    assert torch.equal(model(ids).logits, before)


class Bent(LlamaForCausalLM):
    """A model whose logits depend on more than the last hidden states."""

    def forward(self, *args: Any, **settings: Any) -> Any:
        out = super().forward(*args, **settings)
        out.logits = out.logits + settings["input_ids"][..., None]
        return out


def test_what_cannot_be_scored_is_refused() -> None:
    model, ids = build("llama"), tokens(20)
    with pytest.raises(DataError, match=r"start=20 with 20 tokens: expected 1 to 19"):
        score(model, ids, start=20)
    with pytest.raises(DataError, match=r"shape \(20,\): expected \[batch, tokens\]"):
        score(model, ids[0])
    with pytest.raises(DataError, match=r"attention_mask has shape \(1, 19\)"):
        score(model, ids, attention_mask=torch.ones(1, 19))
    with pytest.raises(DataError, match="chunk=0"):
        score(model, ids, chunk=0)
    with pytest.raises(ModelError, match="no head over a base model"):
        score(BertModel(BertConfig(num_hidden_layers=1, hidden_size=12)), ids)
    with pytest.raises(ModelError, match="cannot score Bent"):
        score(Bent(model.config), ids)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_learned_position_table_is_a_limit(family: str) -> None:
    model = model_of(family)
    assert score(model, tokens(64)).nll.isfinite().all()
    with pytest.raises(ModelError, match="65 tokens are more than the 64 learned positions"):
        score(model, tokens(65))
