"""One matrix: every method on every family has the same properties."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

import longctx
from longctx.checkpoint import load
from longctx.model import rope_of, rotary_of, text_config
from longctx.patch import Method, patch_of
from longctx.registry import method_class
from longctx.rope import Rope, ScaledRotary, frequencies_of
from longctx.train.parallel.before_transformers_5_23 import checkpoint_activations

from .families import WINDOW, build, tokens

FAMILIES = ("llama", "mistral", "qwen3", "gemma3")
SLOWER = tuple(
    pytest.param(family, marks=pytest.mark.slow) for family in ("phi3", "glm", "smollm3", "cohere")
)
MORE = ("qwen2", "phi3", "olmo2", "cohere", "glm", "smollm3")
LONG = WINDOW + 40


@pytest.fixture(autouse=True)
def skip_where_a_config_has_no_place(request: pytest.FixtureRequest) -> None:
    """Phi-3's config takes longrope alone, which cannot say dynamic."""
    case = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if (case.get("family"), case.get("name")) == ("phi3", "dynamic"):
        pytest.skip("Phi-3's config has no place for dynamic")


def settings(name: str) -> Method:
    """The method as the matrix uses it: its own example for these families' geometry."""
    return method_class(name).example(Rope(dim=16, theta=10_000.0, length=WINDOW))


everywhere = pytest.mark.parametrize("family", [*FAMILIES, *SLOWER])
every_method = pytest.mark.parametrize("name", longctx.available())


def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    """All logits of one pass, [batch, seq, vocab]."""
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def at_work(model: PreTrainedModel, ids: Tensor, name: str) -> Tensor:
    """The same in the mode in which the method acts; none of these models has dropout."""
    found = logits(model.train(settings(name).trains_only), ids)
    model.eval()
    return found


def frequencies(model: PreTrainedModel) -> Tensor:
    """The inverse frequencies that the model's rotary turns by, as stored."""
    return frequencies_of(rotary_of(model), rope_of(model).layer_type)[0].clone()


def assert_same(actual: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to a share of the logits' own size."""
    scale = wanted.abs().max().item()
    assert (actual - wanted).abs().max().item() <= tolerance * scale


@every_method
@everywhere
def test_it_changes_the_long_input_and_undo_is_bit_exact(family: str, name: str) -> None:
    model = build(family)
    ids = tokens(LONG)
    before, config = logits(model, ids), model.config.to_dict()
    with longctx.extend(model, settings(name)) as patch:
        assert (at_work(model, ids, name) - before).abs().max() > 1e-3
        assert patch.report().ok, str(patch.report())
    assert torch.equal(logits(model, ids), before)
    assert model.config.to_dict() == config
    assert patch_of(model) is None


@every_method
@everywhere
def test_the_neutral_setting_is_the_identity(family: str, name: str) -> None:
    model = build(family)
    neutral = settings(name).neutral(rope_of(model))
    if neutral is None:
        return
    ids = tokens(LONG)
    before, bits = logits(model, ids), frequencies(model)
    with longctx.extend(model, neutral):
        after = logits(model, ids)
        # Some rewrite θ as (1 − γ)θ + γθ or θ/λ, which rounds; the others leave its bits alone.
        same = torch.equal(frequencies(model), bits)
    if same:
        assert torch.equal(after, before)
    else:
        assert_same(after, before, 1e-4)


@every_method
@everywhere
def test_cached_equals_uncached_across_the_original_window(family: str, name: str) -> None:
    model = build(family)
    ids = tokens(LONG)
    with longctx.extend(model, settings(name)), request(model, LONG):
        whole = logits(model, ids)
        cache = DynamicCache(config=model.config)
        chunks = [logits(model, ids[:, :30], past_key_values=cache)]
        chunks.append(logits(model, ids[:, 30:60], past_key_values=cache))
        chunks += [logits(model, ids[:, i : i + 1], past_key_values=cache) for i in range(60, LONG)]
    assert_same(torch.cat(chunks, dim=1), whole)


@every_method
@everywhere
def test_a_static_cache_agrees(family: str, name: str) -> None:
    model = build(family)
    ids = tokens(LONG)
    with longctx.extend(model, settings(name)), request(model, LONG):
        whole = logits(model, ids)
        cache = StaticCache(config=model.config, max_cache_len=LONG + 8)
        first = logits(model, ids[:, :80], past_key_values=cache)
        rest = [logits(model, ids[:, i : i + 1], past_key_values=cache) for i in range(80, LONG)]
    assert_same(torch.cat([first, *rest], dim=1), whole)


@every_method
@everywhere
def test_left_padding_changes_nothing(family: str, name: str) -> None:
    model = build(family)
    short, long = tokens(70, seed=1), tokens(LONG, seed=2)
    padded = torch.cat([torch.zeros(1, LONG - 70, dtype=torch.long), short], dim=1)
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[0, : LONG - 70] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with longctx.extend(model, settings(name)), request(model, LONG):
        batch = logits(
            model, torch.cat([padded, long]), attention_mask=mask, position_ids=positions
        )
        assert_same(batch[0, LONG - 70 :], logits(model, short)[0])
        assert_same(batch[1], logits(model, long)[0])


@every_method
@everywhere
def test_generation_is_that_of_repeated_whole_passes(family: str, name: str) -> None:
    model = build(family)
    ids = tokens(WINDOW - 2)
    with longctx.extend(model, settings(name)):
        generated = model.generate(
            ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True
        )[0]
        with request(model, WINDOW + 6):
            picks = logits(model, generated[None, :-1])[0, WINDOW - 3 :]
    picks[:, 2] = -torch.inf  # min_new_tokens bars EOS
    assert generated[WINDOW - 2 :].tolist() == picks.argmax(-1).tolist()


@every_method
@everywhere
def test_save_and_load_agree(family: str, name: str, tmp_path: Path) -> None:
    model, tokenizer = build(family), demo_tokenizer()
    ids = tokens(LONG)
    original = logits(model, ids)
    method = settings(name)
    patch = longctx.extend(model, method)
    wanted = logits(model, ids)
    plain = method.plain_loadable
    assert plain == patch.report().plain_loadable
    model.save_pretrained(tmp_path / "plain")
    with contextlib.nullcontext() if plain else pytest.warns(UserWarning, match="longctx.load"):
        saved = longctx.save(model, tokenizer, tmp_path / "ours")
    assert saved.plain == plain
    for folder in ("plain", "ours"):
        if folder == "plain":
            tokenizer.save_pretrained(tmp_path / folder)
        reread = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(reread, ids), wanted) == plain
        restored, _ = load(tmp_path / folder, device="cpu")
        assert torch.equal(logits(restored, ids), wanted)
        back = longctx.patch_of(restored)
        assert back is not None
        assert back.method == method
        back.remove()
        assert torch.equal(logits(restored, ids), original)


@every_method
@everywhere
def test_casting_keeps_float32_frequencies(family: str, name: str) -> None:
    model = build(family).to(torch.bfloat16)
    patch = longctx.extend(model, settings(name))
    if isinstance(rotary_of(model), ScaledRotary):  # else it has no frequencies of its own
        exact = frequencies(model)
        assert exact.dtype == torch.float32
        model.to(torch.float16).to(torch.bfloat16)
        assert torch.equal(frequencies(model), exact)
    assert patch.report().ok, str(patch.report())


@every_method
@everywhere
def test_gradient_checkpointing_gives_the_same_gradients(family: str, name: str) -> None:
    model = build(family).train()
    ids = tokens(LONG)
    with longctx.extend(model, settings(name)):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        checkpoint_activations(model)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        again = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(plain) == len(again) > 0
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@every_method
@pytest.mark.parametrize("family", MORE)
def test_more_families_are_reached(family: str, name: str, tmp_path: Path) -> None:
    model = build(family)
    ids = tokens(LONG)
    before = logits(model, ids)
    with longctx.extend(model, settings(name)) as patch:
        wanted = logits(model, ids)
        assert (at_work(model, ids, name) - before).abs().max() > 1e-3
        assert patch.report().ok
        model.save_pretrained(tmp_path)
        if patch.report().plain_loadable:
            reread = AutoModelForCausalLM.from_pretrained(tmp_path)
            assert torch.equal(logits(reread, ids), wanted)
    assert torch.equal(logits(model, ids), before)


def test_a_config_that_has_no_place_for_a_method_refuses_it() -> None:
    model = build("phi3")
    ids = tokens(LONG)
    before = logits(model, ids)
    with pytest.raises(longctx.ModelError, match="refuses rope_type 'dynamic'"):
        longctx.extend(model, "dynamic", factor=4)
    assert torch.equal(logits(model, ids), before)


@every_method
def test_a_copied_model_has_its_own_patch(name: str) -> None:
    model = build("llama")
    ids = tokens(LONG)
    before = logits(model, ids)
    longctx.extend(model, settings(name))
    twin = copy.deepcopy(model)
    patch = longctx.patch_of(twin)
    assert patch is not None
    assert patch.model is twin
    patch.remove()
    assert torch.equal(logits(twin, ids), before)
    assert longctx.patch_of(model) is not None
    assert (at_work(model, ids, name) - before).abs().max() > 1e-3


@every_method
def test_every_method_documents_its_fields_and_source(name: str) -> None:
    module = __import__(f"longctx.patches.{name}", fromlist=["METHOD"])
    assert "Source" in module.__doc__
    assert method_class(name) is module.METHOD
    assert module.METHOD.name == name
    assert module.METHOD.__doc__


def request(model: PreTrainedModel, length: int) -> contextlib.AbstractContextManager[None]:
    """Begin requests for `length` tokens, as the method on the model wants it."""
    patch = longctx.patch_of(model)
    assert patch is not None
    return patch.method.reserve(model, length)


def demo_tokenizer() -> Any:
    """A tokenizer made on the spot: saving needs one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {str(index): index for index in range(96)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")),
        pad_token="0",
        bos_token="1",
        eos_token="2",
        model_max_length=WINDOW,
    )


def test_the_tokenizer_does_not_truncate_at_the_old_window(tmp_path: Path) -> None:
    model, tokenizer = build("llama"), demo_tokenizer()
    longctx.extend(model, "linear", factor=4)
    longctx.save(model, tokenizer, tmp_path / "out")
    _, again = load(tmp_path / "out", device="cpu")
    assert again.model_max_length == text_config(model).max_position_embeddings == 4 * WINDOW
    assert tokenizer.model_max_length == WINDOW
