"""Linear attention as a conversion: cached as uncached, padded as unpadded, saved and restored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import longctx
from longctx.attention.hook import ATTRIBUTE
from longctx.attention.state_cache import StateLayer
from longctx.config_windows import CONVERSION
from longctx.errors import MethodError, ModelError, RunError
from longctx.fingerprint import model_digest
from longctx.patches._hedgehog import HedgehogAttention
from longctx.patches.linear_attention import LinearAttention
from longctx.prompts.haystacks import Texts
from longctx.train.config import Training
from longctx.train.engine.teaching import frozen
from longctx.train.loss.distillation import Distillation
from longctx.train.loss.objective import Losses
from longctx.train.recipes import UPTRAIN
from longctx.train.run import Run

from ..families import build, tokens
from ..test_matrix import assert_same, demo_tokenizer, logits

FAMILIES = ("llama", "qwen3", "gemma3", "phi3", "smollm3", "cohere")
READ = tokens(48, batch=2, seed=3)
IDS = tokens(60, batch=2)


def made(family: str = "llama", *, steps: int = 1, **fields: Any) -> Any:
    """A converted model of a family, of a window of eight tokens."""
    settings: dict[str, Any] = {"window": 8, "steps": steps, **fields}
    method = LinearAttention(**settings)
    return longctx.convert(build(family), method, calibration=READ)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_is_uncached_and_padded_is_unpadded(family: str) -> None:
    converted = made(family)
    model, report = converted.model, converted.report()
    assert report.ok
    assert not report.exact
    whole = logits(model, IDS)
    with torch.no_grad():
        cache: Any = DynamicCache(config=model.config)
        pieces = [
            model(IDS[:, a:b], past_key_values=cache).logits
            for a, b in ((0, 20), (20, 21), (21, 22), (22, 60))
        ]
        assert_same(torch.cat(pieces, dim=1), whole)
        own = [layer for layer in cache.layers if isinstance(layer, StateLayer)]
        assert [layer.keys.shape[2] for layer in own] == [7] * len(own)  # pyright: ignore[reportOptionalMemberAccess]
        before, after = report.bounded  # of which the first are layers that slide anyway
        assert sum(layer.bytes for layer in own) == 2 * (after - before)
        padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), IDS], dim=1)
        mask = (torch.arange(65) >= 5).long().expand(2, -1)
        found: Any = model(padded, attention_mask=mask, use_cache=False)
        assert_same(found.logits[:, 5:], whole)


@pytest.mark.parametrize("window", [0, 8])
def test_generate_is_the_same_with_any_cache_and_in_any_batch(window: int) -> None:
    model = made(window=window, features=6, keep=1).model
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}

    def continued(ids: Tensor, mask: Tensor, **options: Any) -> list[list[int]]:
        found: Any = model.generate(ids, attention_mask=mask, **settings, **options)
        return found[:, ids.shape[1] :].tolist()

    every = torch.ones_like(IDS)
    wanted = continued(IDS, every, use_cache=False)
    assert continued(IDS, every) == wanted
    assert continued(IDS, every, cache_implementation="static") == wanted
    beams = continued(IDS, every, num_beams=2, use_cache=False)
    assert continued(IDS, every, num_beams=2) == beams
    ids, mask = IDS.clone(), every.clone()
    ids[1, :25], mask[1, :25] = 0, 0
    alone = continued(IDS[1:, 25:], every[1:, 25:])
    assert continued(ids, mask) == [wanted[0], alone[0]]
    with pytest.raises(ModelError, match="cannot take"):
        model.generate(IDS[:1], prompt_lookup_num_tokens=3, **settings)


def test_it_is_saved_and_restored_and_says_what_plain_transformers_would_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = made(keep=(1,)).model, demo_tokenizer()
    with pytest.warns(UserWarning, match="under ordinary attention"):
        saved = longctx.save(model, tokenizer, tmp_path / "out")
    assert not saved.plain
    again, _ = longctx.load(tmp_path / "out")
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert "LOAD REPORT" not in caplog.text
    assert model_digest(again) == model_digest(model)
    with pytest.warns(UserWarning, match="under ordinary attention"):
        longctx.save(again, tokenizer, tmp_path / "twice")
    assert torch.equal(logits(longctx.load(tmp_path / "twice")[0], IDS), logits(model, IDS))
    with pytest.raises(MethodError, match="made by linear_attention: convert its original"):
        longctx.convert(again, "multi_query:1", calibration=READ)
    with pytest.raises(MethodError, match="attention of this model is that of linear_attention"):
        longctx.extend(again, "sink_window:window=8")
    with longctx.extend(again, "yarn", factor=2):
        with pytest.warns(UserWarning, match="linear_attention and yarn|under ordinary"):
            longctx.save(again, tokenizer, tmp_path / "yarn")
        yarn, _ = longctx.load(tmp_path / "yarn")
        assert torch.equal(logits(yarn, IDS), logits(again, IDS))
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert "UNEXPECTED" in caplog.text  # it is told, on stderr
    assert not torch.allclose(logits(plain.eval(), IDS), logits(model, IDS), atol=1e-3)


def test_a_damaged_record_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="linear_attention"):
        longctx.save(made(keep=1).model, demo_tokenizer(), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for change, said in (
        ({"version": 2}, "version: expected 1, got 2"),
        ({"version": "1"}, "version: expected int, got str"),
        ({"name": "moe", "window": 1}, "moe has no field 'features'"),
        ({"name": "nothing"}, "unknown conversion 'nothing'"),
        ({"keep": [0]}, r"layers\.1\.self_attn\.longctx_attention\.query is missing"),
        ({"keep": []}, r"layers\.1\.self_attn\.longctx_attention\.query is missing"),
        ({"keep": [7]}, "layer 7 is not one of full"),
        ({"window": 0}, "of a layer that is to be kept"),
        ({"window": 10**6}, "window=1000000 and the model's 64"),
        ({"keep": "auto:1"}, "keep='auto:1'"),
    ):
        path.write_text(json.dumps({**config, CONVERSION: {**config[CONVERSION], **change}}))
        with pytest.raises((ModelError, MethodError), match=said):
            longctx.load(tmp_path / "out")
    del config[CONVERSION]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="unknown to the model"):
        longctx.load(tmp_path / "out")


def test_transfer_brings_the_outputs_nearer_and_says_so() -> None:
    report = made(steps=12).report()
    details = {check.name: check.detail for check in report.checks}
    shares = [int(x.rstrip("%")) for x in details["layer 0"].replace("(", "").split() if "%" in x]
    assert shares[0] < shares[1]
    assert "in float64" in details["forms agree"]
    assert "first 8" in details["logits of the original"]
    text = str(report)
    assert "512 → 0 bytes per token" in text
    assert "whatever the length" in text
    assert "experimental" in text


def test_a_layer_that_says_nothing_is_fitted_to_that() -> None:
    model = build("llama")
    model.model.layers[0].self_attn.v_proj.weight.data.zero_()
    report = longctx.convert(model, LinearAttention(window=8, steps=1), calibration=READ).report()
    assert "layer 0: misses 0% of the outputs (0% unfitted)" in str(report)


def test_the_layers_that_keys_need_are_found() -> None:
    """An answer's NLL with one layer replaced, as it is measured by hand."""
    model, tokenizer = longctx.load("demo")
    read = Texts(("The manual of a language that counts from zero, and reads on.\n" * 40,))
    method = LinearAttention(window=16, steps=0, keep="auto:2")
    converted = longctx.convert(model, method, tokenizer=tokenizer, calibration=read)
    kept = [
        index
        for index, layer in enumerate(converted.model.model.layers)
        if not isinstance(getattr(layer.self_attn, ATTRIBUTE, None), HedgehogAttention)
    ]
    details = {check.name: check.detail for check in converted.report().checks}
    assert details["layers as they are"] == f"2 of 4: {kept[0]}, {kept[1]}"
    lost = [float(details[f"layer {i}"].partition("lose ")[2].split()[0]) for i in range(4)]
    assert {*kept} == {*sorted(range(4), key=lambda i: -lost[i])[:2]}
    assert converted.model.config.longctx_conversion["keep"] == tuple(kept)
    with pytest.raises(MethodError, match="pass the model's tokenizer"):
        longctx.convert(model, method, calibration=READ)


def test_it_is_taught_by_its_original(tmp_path: Path) -> None:
    original, tokenizer = longctx.load("demo")
    read = torch.arange(256)[None] % 900 + 3
    converted = longctx.convert(original, LinearAttention(window=16, steps=0), calibration=read)
    training = Training(max_steps=2, batch_size=2, learning_rate=1e-3, warmup=0)
    recipe = replace(
        UPTRAIN,
        max_length=96,
        trained_weights="features",
        losses=Losses(distillation=Distillation()),
        training=training,
    )
    before = {name: x.clone() for name, x in converted.model.state_dict().items()}
    text = tmp_path / "text.txt"
    text.write_text("The manual of a language that counts from zero.\n" * 20)
    run = Run(replace(recipe, retrieval=0.0), (str(text),), tmp_path / "run")
    done = run.start(converted.model, tokenizer, teacher=original, progress=False)
    moved = {n for n, x in done.model.state_dict().items() if not torch.equal(x, before[n])}
    assert moved == {name for name in before if ATTRIBUTE in name}
    again, _ = longctx.load(done.saved.path)
    ids = torch.arange(60)[None] * 7
    assert torch.equal(logits(again, ids), logits(done.model, ids))
    none = pytest.raises(RunError, match="the model has none beside those of its family")
    with none, frozen(original, "features"):
        pass


def test_sums_are_float32_under_autocast() -> None:
    rule = HedgehogAttention(2, 1, 16, 8, 32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 256, 16, generator=generator) for h in (2, 1, 1))
    half = [x.bfloat16() for x in (q, k, v)]
    settings: dict[str, Any] = {"mask": None, "positions": None, "scaling": 0.25}
    wanted = rule(*half, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rule(q, k, half[2], **settings), wanted)


def test_packed_documents_do_not_see_each_other() -> None:
    model = made().model
    places = torch.cat([torch.arange(25), torch.arange(35)])[None].expand(2, -1)
    found: Any = model(IDS, position_ids=places, use_cache=False)
    parts = [logits(model, IDS[:, :25]), logits(model, IDS[:, 25:])]
    assert_same(found.logits, torch.cat(parts, dim=1))
    with pytest.raises(ModelError, match="for each query"):
        model(IDS, attention_mask=torch.ones(2, 1, 60, 60, dtype=torch.bool).tril())


def test_what_is_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"window": 65}, "window=65 and the model's 64"),
        ({"keep": (0, 1)}, "leaves no layer"),
        ({"keep": (2,)}, "layer 2 is not one of full"),
    ]
    for fields, said in wrong:
        with pytest.raises(MethodError, match=said):
            made(**fields)
    for fields, said in (
        ({"features": 7}, "features=7: expected an even number"),
        ({"features": 0}, "features=0: expected 2 or more"),
        ({"window": -1}, "window=-1: expected 0 or more"),
        ({"window": 1.5}, "window=1.5"),
        ({"steps": -1}, "steps=-1"),
        ({"keep": "auto:0"}, "keep='auto:0'"),
        ({"keep": "all"}, "keep='all': expected layers"),
        ({"keep": (-1,)}, "keep="),
    ):
        with pytest.raises(MethodError, match=said):
            LinearAttention(**fields)  # pyright: ignore[reportArgumentType]
    with pytest.raises(MethodError, match="which is not undone"):
        made().remove()
    sliding = build("mistral", sliding_window=16)
    with pytest.raises(ModelError, match="all layers of model type 'mistral' slide over 16"):
        longctx.convert(sliding, LinearAttention(window=8), calibration=READ)
    gpt2 = AutoModelForCausalLM.from_config(_gpt2())
    with pytest.raises(ModelError, match="'gpt2'"):
        longctx.convert(gpt2, LinearAttention(window=8), calibration=READ)


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=64)
