"""Shared prefixes: the same scores as whole prompts, for fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import longctx
from longctx.attention.hook import ATTRIBUTE
from longctx.errors import MethodError
from longctx.scoring import prefix_sharing, prefix_tree
from longctx.scoring.prefix_sharing import score_prompts
from longctx.scoring.prefix_tree import obstacle

from ...eval.conftest import byte_model

BUDGET = 4000


@pytest.fixture(autouse=True)
def calls_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that sharing pays at lengths that a test has time for."""
    monkeypatch.setattr(prefix_sharing, "CALL", 0)
    monkeypatch.setattr(prefix_tree, "CALL", 0)


def spine(seed: int, length: int = 900, depths: int = 5) -> tuple[list[list[int]], list[int]]:
    """A haystack of random tokens with a needle at each depth, and a common question."""
    random = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 259, (count,), generator=random).tolist()

    hay, question = draw(length), draw(12)
    prompts = [
        [1, *hay[:place], *draw(9), *hay[place:], *question, *draw(4)]
        for place in (length * d // (depths - 1) for d in range(depths))
    ]
    return prompts, [len(prompt) - 4 for prompt in prompts]


def whole(model: Any, prompts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Any]:
    """(NLL, argmax) in float64 from the logits of each prompt alone."""
    found: list[Any] = []
    for prompt, start in zip(prompts, starts, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, start - 1 : -1].double()
        targets = torch.tensor(prompt[start:])
        nll = -logits.log_softmax(-1)[torch.arange(len(targets)), targets]
        found.append((nll, logits.argmax(-1)))
    return found


def check(model: Any, prompts: Any, starts: Any, **settings: Any) -> Any:
    scores = score_prompts(model, prompts, starts, batch_tokens=BUDGET, **settings)
    for (nll, argmax), own_nll, own_argmax in zip(
        whole(model, prompts, starts), scores.nll, scores.argmax, strict=True
    ):
        torch.testing.assert_close(own_nll.double(), nll, rtol=0, atol=1e-4)
        assert torch.equal(own_argmax, argmax)
    return scores


@pytest.mark.parametrize("method", [None, "yarn:4", "alibi", "sink_window:window=100"])
def test_scores_are_those_of_whole_prompts(method: str | None) -> None:
    model: Any = byte_model()
    if method:
        longctx.extend(model, method)
    before = model.config._attn_implementation
    prompts, starts = spine(0)
    scores = check(model, prompts, starts)
    assert scores.how == "shared prefixes"
    # The haystack once, and what follows the needle at each of the depths 0, 1/4 … 1.
    needle_and_after = 9 + 12 + 4
    assert scores.tokens == pytest.approx(901 + 900 * 2.5 + 5 * needle_and_after, abs=5)
    assert model.config._attn_implementation == before
    if method in (None, "yarn:4"):
        assert not any(hasattr(module, ATTRIBUTE) for module in model.modules())


def test_ends_of_one_branch_run_together_and_prompts_keep_their_places() -> None:
    model = byte_model()
    (first, *_), _ = spine(0)
    ends = [[7, 8, 9, 10], [7, 8, 9, 11], [20, 21, 22, 23], [7, 8, 9, 10], [9, 9, 9, 9, 9]]
    prompts = [[*first, *end] for end in ends]
    starts = [len(first) + 2] * 5
    scores = check(model, prompts, starts)
    assert scores.how == "shared prefixes"
    assert scores.tokens < len(first) + 4 * 6
    assert torch.equal(scores.nll[0], scores.nll[3])


def test_a_scored_token_is_never_cut_off_from_the_one_before_it() -> None:
    model = byte_model()
    prompts, starts = spine(1)
    # The second prompt is scored where the two still agree.
    check(model, [prompts[0], prompts[0]], [starts[0], 300])
    check(model, [prompts[0][:500], prompts[0], prompts[0]], [400, starts[0], starts[0]])


def test_prompts_of_several_lengths_and_haystacks() -> None:
    model = byte_model()
    cases = [spine(seed, length) for seed, length in ((0, 500), (0, 900), (3, 700))]
    prompts = [prompt for some, _ in cases for prompt in some]
    starts = [start for _, some in cases for start in some]
    assert check(model, prompts, starts).how == "shared prefixes"


def test_a_method_that_depends_on_the_length_is_run_whole() -> None:
    model = byte_model()
    longctx.extend(model, "dynamic", factor=4)
    prompts, starts = spine(0)
    scores = check(model, prompts, starts, length_invariant=False)
    assert scores.how == "whole prompts (length-dependent method)"
    assert scores.tokens == sum(map(len, prompts))
    with pytest.raises(MethodError, match="dynamic: nothing is known of"):
        score_prompts(model, prompts, starts, batch_tokens=BUDGET)  # sharing would be wrong


def test_models_without_a_cache_to_crop_are_run_whole() -> None:
    sizes: dict[str, Any] = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2}
    sliding = MistralForCausalLM(
        MistralConfig(
            **sizes,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=64,
        )
    ).eval()
    recurrent = MambaForCausalLM(MambaConfig(**sizes, state_size=4)).eval()
    prompts, starts = spine(0, 300)
    for model, why in ((sliding, "DynamicSlidingWindowLayer"), (recurrent, "recurrent state")):
        assert why in str(obstacle(model))
        assert check(model, prompts, starts).how == f"whole prompts ({obstacle(model)})"


def test_models_without_a_rotary_share_too() -> None:
    config = GPT2Config(vocab_size=259, n_positions=1000, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    prompts, starts = spine(0)
    assert check(model, prompts, starts).how == "shared prefixes"


def test_short_prompts_run_whole_since_that_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    prompts, starts = spine(0, 100)
    scores = check(byte_model(), prompts, starts)
    assert scores.how == "whole prompts (cheaper)"


def test_without_memory_for_a_cache_prompts_are_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(prefix_tree, "prefill", full)
    model: Any = byte_model()
    before = model.config._attn_implementation
    prompts, starts = spine(0)
    assert check(model, prompts, starts).how == "whole prompts (no memory for a cache)"
    assert model.config._attn_implementation == before


def test_running_out_of_memory_halves_the_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = byte_model()
    (first, *_), _ = spine(0)
    prompts = [[*first, 7, 8, 9, last] for last in range(10, 16)]
    sizes: list[int] = []
    real = prefix_sharing.score

    def small(model: Any, ids: Any, **settings: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, ids, **settings)

    monkeypatch.setattr(prefix_sharing, "score", small)
    scores = score_prompts(model, prompts, [len(first) + 3] * 6, batch_tokens=10**6)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    monkeypatch.undo()
    assert scores.how == "shared prefixes"
    for nll, (wanted, _) in zip(
        scores.nll, whole(model, prompts, [len(first) + 3] * 6), strict=True
    ):
        torch.testing.assert_close(nll.double(), wanted, rtol=0, atol=1e-4)
