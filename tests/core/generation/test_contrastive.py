"""Contrastive search against the forms that it must equal: sequential, and without any cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize
from transformers import PreTrainedModel

import longctx
from longctx.errors import LongctxError, ModelError, RunError
from longctx.generation.decodings import contrastive
from longctx.generation.decodings.contrastive import Contrastive, packs

from ...families import build
from ...test_matrix import demo_tokenizer

PROMPTS = [[5, 9, 17, 33, 2, 8, 41, 7], [11, 3, 60], [21, 22, 23, 24, 25]]
NEW = 14


def naive(model: PreTrainedModel, prompt: Sequence[int], k: int, alpha: float) -> list[int]:
    """Every candidate's hidden state from a forward of all tokens, without a cache."""
    ids, said = [*prompt], list[int]()
    with torch.no_grad():
        for _ in range(NEW):
            out: Any = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
            before = normalize(out.hidden_states[-1][0].double(), dim=-1)
            top = out.logits[0, -1].double().softmax(-1).topk(k)
            merits = list[float]()
            for p, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                own: Any = model(torch.tensor([[*ids, token]]), output_hidden_states=True)
                hidden = normalize(own.hidden_states[-1][0, -1].double(), dim=-1)
                merits.append((1 - alpha) * p - alpha * float((before @ hidden).max()))
            said.append(int(top.indices[merits.index(max(merits))]))
            ids.append(said[-1])
    return said


def said_by(model: PreTrainedModel, prompts: Sequence[Sequence[int]], k: int) -> list[list[int]]:
    tokenizer = demo_tokenizer()
    said = longctx.generate(
        model, tokenizer, [[*p] for p in prompts], decoding=Contrastive(k=k), max_new_tokens=NEW,
        ignore_eos=True,
    )  # fmt: skip
    return [[*row] for row in said.token_ids]


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
def test_it_is_the_naive_form_in_a_padded_batch(
    family: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family).double().eval()
    wanted = [naive(model, prompt, k, 0.6) for prompt in PROMPTS]
    assert said_by(model, PROMPTS, k) == wanted
    monkeypatch.setattr(contrastive, "packs", lambda model: False)
    assert said_by(model, PROMPTS, k) == wanted


def test_a_model_without_rotary_reads_candidates_as_rows() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).double().eval()
    assert not packs(model)
    assert said_by(model, PROMPTS, 3) == [naive(model, prompt, 3, 0.6) for prompt in PROMPTS]


def test_candidates_are_packed_where_positions_are_all() -> None:
    assert packs(build("llama"))
    assert not packs(build("gemma3"))  # its layers slide
    for method, packed in (("yarn:2", True), ("dynamic:2", True), ("alibi", False)):
        model = build("llama")
        with longctx.extend(model, longctx.parse_method(method)):  # pyright: ignore[reportArgumentType]
            assert packs(model) == packed


@pytest.mark.parametrize(
    "method",
    [
        "yarn:2", "dynamic:2", "alibi", "dual_chunk:factor=2,chunk=8,local=4", "log_n",
        "sink_window:sinks=2,window=6", "block_sparse:pattern=banded,window=4",
    ],
)  # fmt: skip
def test_under_patches_beyond_the_window(method: str) -> None:
    parsed = longctx.parse_method(method)
    assert parsed is not None
    model = build("llama", max_position_embeddings=16 if method != "log_n" else 32).double().eval()
    with longctx.extend(model, parsed):
        wanted = list[list[int]]()
        for prompt in PROMPTS:
            with parsed.reserve(model, len(prompt) + NEW):  # as `generate` begins a request
                wanted.append(naive(model, prompt, 3, 0.6))
        assert said_by(model, PROMPTS, 3) == wanted


def test_alpha_0_is_greedy_and_alpha_1_is_not() -> None:
    model = build("llama").double().eval()
    tokenizer = demo_tokenizer()
    common: Any = {"max_new_tokens": 10, "ignore_eos": True}
    greedy = longctx.generate(model, tokenizer, PROMPTS, **common)
    alike = longctx.generate(model, tokenizer, PROMPTS, decoding=Contrastive(alpha=0.0), **common)
    other = longctx.generate(model, tokenizer, PROMPTS, decoding=Contrastive(alpha=1.0), **common)
    assert greedy.token_ids == alike.token_ids != other.token_ids


def test_the_embedded_model_says_what_the_naive_form_does() -> None:
    model, tokenizer = longctx.load("demo")
    model = model.double()
    prompts = [tokenizer(text)["input_ids"] for text in ("The parser reads", "Once")]
    assert said_by(model, prompts, 4) == [naive(model, p, 4, 0.6) for p in prompts]


def test_a_guard_holds_even_when_few_candidates_are_left() -> None:
    model = build("llama").double().eval()
    said = longctx.generate(
        model, demo_tokenizer(), PROMPTS, decoding=Contrastive(k=2, alpha=0.1), ignore_eos=True,
        guard=longctx.LoopGuard(mode="ban", copies=2, min_length=2, max_period=8),
        max_new_tokens=40,
    )  # fmt: skip
    for row in said.token_ids:
        for end in range(2, len(row) + 1):
            for period in range(1, min(8, end // 2) + 1):
                assert row[end - period : end] != row[end - 2 * period : end - period]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 1}, "nothing to choose"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"k": True}, "k=True"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        Contrastive(**fields)


def test_a_model_without_keys_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=96, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = MambaForCausalLM(config).eval()
    with pytest.raises(ModelError, match="contrastive search takes candidates back"):
        longctx.generate(
            model, demo_tokenizer(), [[1, 2, 3]], decoding="contrastive", max_new_tokens=2
        )
    assert issubclass(ModelError, LongctxError)
