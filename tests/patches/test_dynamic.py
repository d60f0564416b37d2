"""Dynamic NTK keeps one base per request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import longctx
from longctx.errors import MethodError, ModelError
from longctx.patches.dynamic import Dynamic, reserve

from ..families import WINDOW, build, tokens


def test_inside_the_window_it_is_the_identity() -> None:
    model, ids = build("llama"), tokens(WINDOW)
    before = model(ids).logits
    with longctx.extend(model, Dynamic(factor=4)):
        assert torch.equal(model(ids).logits, before)


def test_one_pass_is_that_of_transformers(tmp_path: Path) -> None:
    model = build("llama")
    longctx.extend(model, Dynamic(factor=2))
    model.save_pretrained(tmp_path)
    for length in (30, 100, 150, 40):
        # Made anew each time: some releases keep the base of a longer input for a shorter one.
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        ids = tokens(length)
        assert torch.equal(model(ids).logits, theirs(ids).logits)


def test_a_request_that_outgrows_its_length_is_refused() -> None:
    model, ids = build("llama"), tokens(WINDOW + 10)
    longctx.extend(model, Dynamic(factor=4))
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache)
    with pytest.raises(MethodError, match=r"begun for 73 tokens .* position 73"):
        model(ids[:, -1:], past_key_values=cache)


def test_reserving_makes_room_and_ends_with_the_block() -> None:
    model, ids = build("llama"), tokens(WINDOW + 10)
    longctx.extend(model, Dynamic(factor=4))
    with reserve(model, WINDOW + 10):
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], past_key_values=cache)
        last = model(ids[:, 20:], past_key_values=cache).logits[:, -1]
    whole = model(ids).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(MethodError, match="nothing to reserve"), reserve(build("llama"), 9):
        pass


def test_generate_settles_the_length_however_it_is_asked() -> None:
    model, ids = build("llama"), tokens(WINDOW - 1)
    longctx.extend(model, Dynamic(factor=4))
    wanted = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    config = model.generation_config
    config.update(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(inputs=ids), wanted)
    assert torch.equal(model.generate(ids, generation_config=config), wanted)
    config.max_new_tokens = config.min_new_tokens = None
    longer = model.generate(ids, max_length=WINDOW + 5, min_length=WINDOW + 5)
    assert torch.equal(longer, wanted)


def test_a_config_class_that_takes_other_types_of_rope_only_refuses_it() -> None:
    with pytest.raises(ModelError, match="refuses rope_type 'dynamic'"):
        longctx.extend(build("phi3"), Dynamic(factor=4))


def test_the_window_is_what_it_claims_to_read() -> None:
    model = build("llama")
    patch = longctx.extend(model, "dynamic", factor=4)
    assert model.config.max_position_embeddings == WINDOW
    assert patch.report().window == patch.window == 4 * WINDOW
