"""Scores over compressed caches against a plain loop of transformers' own calls."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    QuantizedCache,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

import longctx
from longctx.errors import DataError, ModelError, RunError
from longctx.scoring import compressed_caches
from longctx.scoring.compressed_caches import (
    CompressedCache,
    Press,
    Quantized,
    Sliding,
    parse_cache,
)
from longctx.scoring.over_cache import CacheReader, full_cache_bytes, score_over_cache
from longctx.scoring.token_scores import score

from ...families import build

CONTEXT, START, LENGTH = 61, 70, 76


@dataclass
class EverySecond:
    """A press as kvpress makes them: it keeps a share of each layer's keys, by their places."""

    compression_ratio: float = 0.5
    least: int = 8

    @contextmanager
    def __call__(self, model: Any) -> Generator[None]:
        hooks = [
            layer.self_attn.register_forward_hook(self._hook, with_kwargs=True)
            for layer in model.model.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        tokens = kwargs["hidden_states"].shape[1]
        assert tokens >= self.least, f"expected {self.least} tokens"
        assert int(kwargs["cache_position"][-1]) + 1 == tokens, "the context alone is compressed"
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        step = round(1 / (1 - self.compression_ratio))
        layer.keys, layer.values = layer.keys[:, :, ::step], layer.values[:, :, ::step]
        return output


KINDS = [
    Sliding(20),
    Quantized(bits=8, backend="fp8"),
    Press(EverySecond()),
]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    torch.manual_seed(1)
    return torch.randint(3, 97, (LENGTH,)).tolist()


def caches_of(model: Any, kind: CompressedCache) -> Any:
    """The cache that transformers makes of it."""
    if isinstance(kind, Sliding):
        cache = DynamicCache(config=model.config)
        layers: Any = [DynamicSlidingWindowLayer(kind.window) for _ in cache.layers]
        cache.layers = layers
        return cache
    if isinstance(kind, Quantized):
        return QuantizedCache(backend=kind.backend, config=model.config)
    return DynamicCache(config=model.config)


def naive(model: Any, kind: CompressedCache, prompt: Sequence[int]) -> tuple[Tensor, Any]:
    """Logits that predict each token from START on, by the model's own forward, and the cache."""
    cache = caches_of(model, kind)
    with torch.no_grad():
        with kind.compressing(model):
            more = {"cache_position": torch.arange(CONTEXT)} if isinstance(kind, Press) else {}
            model(torch.tensor([prompt[:CONTEXT]]), past_key_values=cache, **more)
        rows: list[Tensor] = []
        for first, last in [(CONTEXT, START), *((i, i + 1) for i in range(START, LENGTH - 1))]:
            places = torch.arange(first, last)[None]
            ids = torch.tensor([prompt[first:last]])
            out = model(ids, past_key_values=cache, position_ids=places)
            rows.append(out.logits[0, -1])
    return torch.stack(rows), cache


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_scores_are_those_of_a_plain_loop(model: Any, prompt: list[int], kind: Any) -> None:
    found = score_over_cache(model, prompt, kind, context_end=CONTEXT, start=START)
    logits, cache = naive(model, kind, prompt)
    targets = torch.tensor(prompt[START:])
    torch.testing.assert_close(
        found.nll, torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    )
    assert found.argmax.tolist() == logits.argmax(-1).tolist()
    assert found.tokens == LENGTH - 1
    full = score(model, torch.tensor([prompt]), start=START)
    assert (found.nll - full.nll[0]).abs().max() > 1e-3, "the cache loses something"
    held = cache.layers[0].keys
    kept = {"sliding": 19, "kvpress": 31 + LENGTH - 1 - CONTEXT}
    if kind.name in kept:
        assert held.shape[2] == kept[kind.name]
        assert found.cache_bytes == 2 * 2 * 2 * 8 * 4 * kept[kind.name]
    else:  # a byte and, for each layer's keys and values, a scale
        assert found.cache_bytes == 2 * 2 * (2 * 8 * (LENGTH - 1) + 4)


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_scores_are_what_generate_says_over_the_cache(
    model: Any, prompt: list[int], kind: Any
) -> None:
    cache = caches_of(model, kind)
    with torch.no_grad():
        model(torch.tensor([prompt[:CONTEXT]]), past_key_values=cache)
    ids = torch.tensor([prompt[:START]])
    said = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    whole = said[0].tolist()
    found = score_over_cache(model, whole, kind, context_end=CONTEXT, start=START)
    assert found.argmax.tolist() == whole[START:]


def test_a_cache_that_drops_nothing_gives_the_scores_of_the_full_one(
    model: Any, prompt: list[int]
) -> None:
    full = score(model, torch.tensor([prompt]), start=START)
    for kind in (Sliding(LENGTH + 1), Press(EverySecond(compression_ratio=0.0))):
        found = score_over_cache(model, prompt, kind, context_end=CONTEXT, start=START)
        torch.testing.assert_close(found.nll, full.nll[0])
        assert found.argmax.tolist() == full.argmax[0].tolist()
        assert found.cache_bytes == full_cache_bytes(model, LENGTH - 1)


def test_what_a_method_keeps_counts_as_its_full_cache(model: Any) -> None:
    whole = full_cache_bytes(model, 200)
    assert whole == 200 * 2 * 2 * 2 * 8 * 4
    with longctx.extend(model, "sink_window", sinks=4, window=60):
        assert full_cache_bytes(model, 200) == whole * 63 // 200
        assert full_cache_bytes(model, 20) == whole // 10
    other = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1))
    assert full_cache_bytes(other, 20) is None


def test_positions_are_those_of_the_text(model: Any, prompt: list[int]) -> None:
    reader = CacheReader(model, prompt[:CONTEXT], Press(EverySecond()))
    assert reader.cache.get_seq_length() == 31
    reader.read(prompt[CONTEXT:START])
    assert reader.tokens == START
    assert reader.cache.get_seq_length() == 31 + START - CONTEXT


def test_places_must_follow_each_other(model: Any, prompt: list[int]) -> None:
    for context_end, start in ((0, 5), (9, 9), (9, 8), (9, LENGTH)):
        with pytest.raises(DataError, match="expected a context, something read after it"):
            score_over_cache(model, prompt, KINDS[0], context_end=context_end, start=start)


def test_a_press_that_fails_is_named_with_the_context(model: Any, prompt: list[int]) -> None:
    press = Press(EverySecond(least=100))
    with pytest.raises(RunError, match=r"least=100 fails on a context of 61 tokens .*expected 100"):
        CacheReader(model, prompt[:CONTEXT], press)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quantised:4", "unknown cache 'quantised'; did you mean 'quantized'"),
        ("full:4", "'full:4': full keeps everything and has no settings"),
        ("quantized:5", "bits=5: hqq has 1, 2, 3, 4, 8"),
        ("quantized:8,backend=quanto", "bits=8: quanto has 2, 4"),
        ("quantized:4,backend=fp8", "bits=4: fp8 has 8"),
        ("quantized:8,backend=fp8,group_size=32", "leave group_size and residual_length out"),
        ("quantized:4,backend=aqt", "expected hqq, quanto or fp8"),
        ("quantized:four", "bits='four'"),
        ("quantized:4,group=8", "no field 'group'; did you mean 'group_size'"),
        ("quantized:4,group_size=-1", "group_size=-1: expected a whole number, 1"),
        ("sliding:1", "window=1: expected a whole number, 2"),
        ("sliding:1k", "window='1k'"),
        ("sliding:8,9", "expected field=value"),
        ("kvpress", "names no press"),
        ("kvpress:compression_ratio=0.5", "names no press"),
    ],
)
def test_what_cannot_be_is_said(text: str, said: str) -> None:
    with pytest.raises(RunError) as error:
        parse_cache(text)
    assert said in str(error.value)


def test_a_kvpress_that_lacks_a_package_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvpress.py").write_text("import longctx_has_no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kvpress", raising=False)
    with pytest.raises(RunError, match=r"No module named .*pip install --no-deps kvpress .* fire"):
        parse_cache("kvpress:SnapKVPress")


def test_caches_are_written_as_they_are_read() -> None:
    for text in ("quantized:4", "quantized:2,backend=quanto,group_size=32", "sliding:512"):
        assert str(parse_cache(text)) == text
    assert parse_cache(" full ") is None
    assert str(Press(EverySecond())) == "kvpress:EverySecond"
    assert str(Press(EverySecond(0.75))) == "kvpress:EverySecond,compression_ratio=0.75"
    record = Press(EverySecond(0.75)).record()
    assert record == {"name": "kvpress", "press": "kvpress:EverySecond,compression_ratio=0.75"}


def test_a_press_leaves_no_trace_and_drops_what_it_says(model: Any, prompt: list[int]) -> None:
    class Hiding(EverySecond):
        def _hook(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            module.rotary_emb = model.model.rotary_emb  # as kvpress leaves it
            module.masked_key_indices = (0,) if self.least else None
            return super()._hook(module, args, kwargs, output)

    before = [name for name, _ in model.named_modules(remove_duplicate=False)]
    state = torch.get_rng_state()
    CacheReader(model, prompt[:CONTEXT], Press(Hiding(least=0)))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RunError, match="hides keys in attention and drops none"):
        CacheReader(model, prompt[:CONTEXT], Press(Hiding()))
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == before
    assert not any(hasattr(module, "masked_key_indices") for module in model.modules())


def test_presses_that_compress_elsewhere_are_refused() -> None:
    made: Any = type("KeyRerotationPress", (EverySecond,), {})
    with pytest.raises(RunError, match="KeyRerotationPress moves keys to other positions"):
        Press(made())
    with pytest.raises(RunError, match="is not a press"):
        Press(EverySecond)


def test_a_package_that_is_missing_is_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        return None

    monkeypatch.setattr(compressed_caches, "find_spec", nothing)
    with pytest.raises(RunError, match=r"quantized:4 needs hqq, .*'longctx-toolkit\[quantized\]'"):
        Quantized().fitted(model)
    with pytest.raises(RunError, match=r"needs optimum.quanto, .*pip install optimum-quanto"):
        Quantized(backend="quanto").fitted(model)
    with pytest.raises(RunError, match=r"needs kvpress, .*--no-deps kvpress"):
        parse_cache("kvpress:SnapKVPress,compression_ratio=0.5")


def test_models_that_keep_something_else_are_refused(model: Any) -> None:
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ModelError, match="'mamba' keeps a recurrent state"):
        Sliding(20).fitted(recurrent)
    with (
        longctx.extend(model, "sink_window", sinks=4, window=60),
        pytest.raises(ModelError, match="keep a SinkLayer of their own"),
    ):
        Press(EverySecond()).fitted(model)
    for kind in KINDS:
        with pytest.raises(ModelError, match=r"'gemma3_text'. keep a DynamicSlidingWindowLayer"):
            kind.fitted(build("gemma3"))


def test_groups_cut_the_keys_of_any_number_of_tokens(model: Any, prompt: list[int]) -> None:
    pytest.importorskip("hqq")
    full = score(model, torch.tensor([prompt]), start=START).nll[0]
    errors: list[float] = []
    for bits, group_size in ((8, 16), (4, 8)):  # 16 numbers of a token; two groups go together
        kind = Quantized(bits=bits).fitted(model)
        assert kind == Quantized(bits=bits, group_size=group_size)
        for context_end in (CONTEXT, CONTEXT + 1):
            found = score_over_cache(model, prompt, kind, context_end=context_end, start=START)
            errors.append(float((found.nll - full).abs().max()))
    assert max(errors[:2]) < 0.05 < 0.1 < min(errors[2:])
    with pytest.raises(ModelError, match=r"16 numbers of a token .*, of which hqq packs 2 .*=8"):
        Quantized(bits=4, group_size=16).fitted(model)
    with pytest.raises(ModelError, match="packs 4 together: choose other bits"):
        Quantized(bits=2).fitted(model)
