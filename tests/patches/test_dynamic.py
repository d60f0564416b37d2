"""Dynamic NTK keeps one base per request."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

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


def test_generate_without_a_length_is_not_ended_by_the_old_window() -> None:
    model, ids = build("llama"), tokens(WINDOW - 5)
    longctx.extend(model, Dynamic(factor=4))
    wanted = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    model.generation_config.eos_token_id = None
    assert torch.equal(model.generate(ids, do_sample=False), wanted)


def test_a_config_class_that_takes_other_types_of_rope_only_refuses_it() -> None:
    with pytest.raises(ModelError, match="refuses rope_type 'dynamic'"):
        longctx.extend(build("phi3"), Dynamic(factor=4))


def test_the_window_is_what_it_claims_to_read() -> None:
    model = build("llama")
    patch = longctx.extend(model, "dynamic", factor=4)
    assert model.config.max_position_embeddings == WINDOW
    assert patch.report().window == patch.window == 4 * WINDOW


@torch.no_grad()
def test_a_request_between_two_others_changes_neither() -> None:
    model, ids = build("llama"), tokens(WINDOW + 36)
    longctx.extend(model, Dynamic(factor=4))
    wanted = model(ids[:, :50]).logits[:, 40:]
    cache = DynamicCache(config=model.config)
    model(ids[:, :40], past_key_values=cache)
    longer = model(ids).logits
    kept = copy.deepcopy(cache)
    for one in (cache, kept):
        got = model(ids[:, 40:50], past_key_values=one).logits
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids).logits, longer, rtol=0, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch(side: str) -> None:
    model = build("llama")
    longctx.extend(model, Dynamic(factor=4))
    rows = [tokens(length, seed=length) for length in (90, 70, 30)]
    ids, mask = torch.zeros(3, 90, dtype=torch.long), torch.zeros(3, 90, dtype=torch.long)
    places = [slice(90 - x.shape[1], 90) if side == "left" else slice(x.shape[1]) for x in rows]
    for row, (x, place) in enumerate(zip(rows, places, strict=True)):
        ids[row, place], mask[row, place] = x[0], 1
    together = model(ids, attention_mask=mask).logits
    for row, (x, place) in enumerate(zip(rows, places, strict=True)):
        alone = model(x).logits[0]
        torch.testing.assert_close(together[row, place], alone, rtol=0, atol=2e-4)
    if side == "left":
        call: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        both = model.generate(ids, attention_mask=mask, **call)[:, 90:]
        for row, x in enumerate(rows):
            assert torch.equal(both[row], model.generate(x, **call)[0, x.shape[1] :])
        chunked = model.generate(ids, attention_mask=mask, prefill_chunk_size=16, **call)
        assert torch.equal(chunked[:, 90:], both)
        beams = model.generate(ids[:2], attention_mask=mask[:2], num_beams=2, **call)[:, 90:]
        for row, x in enumerate(rows[:2]):
            alone = model.generate(x, num_beams=2, **call)
            assert torch.equal(beams[row], alone[0, x.shape[1] :])


def test_the_next_turn_on_a_returned_cache_is_read_as_without_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = build("llama"), tokens(100)
    longctx.extend(model, Dynamic(factor=4))
    call: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    first = model.generate(ids[:, :50], return_dict_in_generate=True, **call)
    turn = torch.cat([first.sequences, ids[:, :30]], 1)
    wanted = model.generate(turn, **call)
    assert torch.equal(model.generate(turn, past_key_values=first.past_key_values, **call), wanted)
    assert "read anew" in caplog.text
    caplog.clear()
    with reserve(model, 100):  # begun for both turns, so that the cache is kept
        first = model.generate(ids[:, :50], return_dict_in_generate=True, **call)
        turn = torch.cat([first.sequences, ids[:, :30]], 1)
        wanted = model.generate(turn, **call)
        assert torch.equal(
            model.generate(turn, past_key_values=first.past_key_values, **call), wanted
        )
    assert not caplog.text


def test_a_cache_of_unknown_origin_is_refused() -> None:
    model, ids = build("llama"), tokens(40)
    cache = model(ids, use_cache=True).past_key_values
    longctx.extend(model, Dynamic(factor=4))
    with pytest.raises(MethodError, match="filled before the model was extended"):
        model(ids, past_key_values=cache)


def test_assisted_decoding_gives_greedy_tokens() -> None:
    model, draft = build("llama"), build("llama", num_hidden_layers=1)
    for each in (model, draft):
        longctx.extend(each, Dynamic(factor=4))
    ids = tokens(20, seed=3).repeat(1, 3)
    call: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(ids, **call)
    assert torch.equal(model.generate(ids, assistant_model=draft, **call), wanted)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=8, **call), wanted)
    assert torch.equal(model.generate(ids, prefill_chunk_size=16, **call), wanted)


def test_a_pickled_model_comes_back_with_its_patch() -> None:
    model, ids = build("llama"), tokens(WINDOW + 20)
    longctx.extend(model, Dynamic(factor=4))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        patch = longctx.patch_of(again)
        assert patch is not None
        assert patch.report().ok
        assert torch.equal(again(ids).logits, model(ids).logits)
        call: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(again.generate(ids, **call), model.generate(ids, **call))
        patch.remove()
        assert torch.equal(again(ids).logits, build("llama")(ids).logits)


def test_lengths_are_those_that_generate_takes() -> None:
    """By position, or from the model's own settings where a config names none."""
    model = build("llama")
    longctx.extend(model, Dynamic(factor=4))
    model.generation_config.eos_token_id = None  # a config cannot say that there is none
    ids = tokens(WINDOW - 8)
    new = 3 * WINDOW
    bare: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(ids, max_new_tokens=new, **bare)
    settings = GenerationConfig(max_new_tokens=new, **bare)
    assert torch.equal(model.generate(ids, settings), wanted)
    model.generation_config.max_new_tokens = new
    assert torch.equal(model.generate(ids, generation_config=GenerationConfig(**bare)), wanted)


def test_rows_of_a_cache_move_with_what_they_were_begun_for() -> None:
    model = build("llama").double()
    longctx.extend(model, Dynamic(factor=4))
    long, short = tokens(2 * WINDOW), tokens(WINDOW + 10, seed=1)
    pad = torch.zeros(1, WINDOW - 10, dtype=torch.long)
    ids = torch.cat([long, torch.cat([pad, short], 1)])
    mask = torch.cat([torch.ones_like(long), torch.cat([pad, torch.ones_like(short)], 1)])
    said = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    cache = pickle.loads(pickle.dumps(said.past_key_values))
    cache.crop(-7)
    last = said.sequences[:, -8:-7]
    whole = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    position = torch.tensor([[2 * WINDOW], [WINDOW + 10]])

    def logits(cache: Any, rows: list[int]) -> torch.Tensor:
        return model(
            last[rows],
            attention_mask=whole[rows],
            position_ids=position[rows],
            past_key_values=cache,
        ).logits[:, -1]

    wanted = logits(copy.deepcopy(cache), [0, 1])
    flipped, one = copy.deepcopy(cache), copy.deepcopy(cache)
    flipped.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(logits(flipped, [1, 0]), wanted[[1, 0]], rtol=0, atol=1e-9)
    one.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(logits(one, [1]), wanted[[1]], rtol=0, atol=1e-9)
    cache.batch_repeat_interleave(2)
    rows = [0, 0, 1, 1]
    torch.testing.assert_close(logits(cache, rows), wanted[rows], rtol=0, atol=1e-9)


def test_threads_take_turns() -> None:
    model = build("llama")
    longctx.extend(model, Dynamic(factor=4))
    prompts = [tokens(size, seed=size) for size in (WINDOW - 8, 2 * WINDOW, 20, 3 * WINDOW)]

    def said(ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)

    wanted = [said(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(said, prompts))
    assert all(map(torch.equal, found, wanted))
