"""`longctx.generate`: prompts, batches, ends, streams, windows, wrappers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import longctx
from longctx.catalogue import entries
from longctx.errors import DataError, ModelError, RunError
from longctx.generation.decodings.dry import Dry
from longctx.generation.decodings.greedy import Greedy
from longctx.generation.detokenize import TextStream, text_of
from longctx.generation.presets import PRESETS
from longctx.generation.registry import decoding_class, parse_decoding

from ...families import build
from ...test_matrix import demo_tokenizer

DECODINGS = (*longctx.available_decodings(), *PRESETS, "noise:where=embeddings")
PROMPTS = [[5, 9, 17, 33, 2, 8, 41, 7], [11, 3, 60], [21, 22, 23, 24, 25]]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build("llama").double().eval()


@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_row_does_not_depend_on_its_batch(tiny: Any, decoding: str) -> None:
    common: Any = {"decoding": decoding, "max_new_tokens": 16, "seed": 5, "ignore_eos": True}
    together = longctx.generate(tiny, demo_tokenizer(), PROMPTS, **common)
    pairs = longctx.generate(tiny, demo_tokenizer(), PROMPTS, batch_size=2, **common)
    assert together == pairs
    for row, prompt in enumerate(PROMPTS):
        alone = longctx.generate(tiny, demo_tokenizer(), prompt, first_row=row, **common)
        assert alone.token_ids[0] == together.token_ids[row]
    assert all(len(row) == 16 for row in together.token_ids)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_checkpoint_changes_nothing_but_the_ends(tiny: Any, decoding: str) -> None:
    common: Any = {"decoding": decoding, "max_new_tokens": 16}
    free = longctx.generate(tiny, demo_tokenizer(), PROMPTS, ignore_eos=True, **common)
    kept = tiny.generation_config
    tiny.generation_config = GenerationConfig(
        do_sample=True, temperature=9.0, top_k=3, repetition_penalty=3.0, num_beams=2,
        suppress_tokens=[free.token_ids[0][0]], forced_eos_token_id=3, max_length=9,
        no_repeat_ngram_size=1,
    )  # fmt: skip
    try:
        assert longctx.generate(tiny, demo_tokenizer(), PROMPTS, ignore_eos=True, **common) == free
        end = free.token_ids[1][7]
        tiny.generation_config.eos_token_id = [95, end]
        ends = {95, end, demo_tokenizer().eos_token_id}
        ended = longctx.generate(tiny, demo_tokenizer(), PROMPTS, **common)
    finally:
        tiny.generation_config = kept
    if decoding not in ("beam", "translation"):  # where an end changes what beams are kept
        for row, tokens in enumerate(free.token_ids):
            stop = next((i for i, token in enumerate(tokens) if token in ends), None)
            assert ended.token_ids[row] == tokens[:stop]
            assert ended.finish_reasons[row] == ("length" if stop is None else "eos")
    assert all(ends.isdisjoint(tokens) for tokens in ended.token_ids)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_text_is_streamed_as_it_settles(decoding: str) -> None:
    model, tokenizer = longctx.load("demo")
    pieces: list[tuple[int, str]] = []
    said = longctx.generate(
        model, tokenizer, ["The parser", "Once"], decoding=decoding, max_new_tokens=24,
        stream=lambda row, text: pieces.append((row, text)), ignore_eos=True,
    )  # fmt: skip
    for row in range(2):
        assert "".join(text for index, text in pieces if index == row) == said.texts[row]
    if "beam" not in str(parse_decoding(decoding)).lower():
        assert len(pieces) > 40  # 48 tokens; a piece for each, but for parts of characters
    assert all(text for _, text in pieces)


def test_a_character_of_several_tokens_is_shown_once_it_is_whole() -> None:
    _, tokenizer = longctx.load("demo")
    text = "naïve 🦙🦙 – 漢字\n\n  done"
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text) // 2
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    for count in range(1, len(ids) + 1):
        stream.show(ids[:count], last=count == len(ids))
    assert "".join(pieces) == text_of(tokenizer, ids) == text
    assert not any("\ufffd" in piece for piece in pieces)
    stream = TextStream(tokenizer, pieces.append)
    broken = ids[: ids.index(tokenizer("🦙", add_special_tokens=False)["input_ids"][0]) + 1]  # pyright: ignore[reportArgumentType, reportCallIssue]
    stream.show(broken)
    pieces.clear()
    stream.show(broken, last=True)
    assert "".join(pieces) == text_of(tokenizer, broken)


def test_prompts_may_be_one_or_several_of_three_kinds() -> None:
    model, tokenizer = longctx.load("demo")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chat = [{"role": "user", "content": "Hi"}]
    text = "user: Hi\n"
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    common: Any = {"max_new_tokens": 5}
    wanted = longctx.generate(model, tokenizer, ids, **common).token_ids
    for prompts in (chat, [chat], [ids], torch.tensor(ids), tuple(ids), torch.tensor([ids])):
        assert longctx.generate(model, tokenizer, prompts, **common).token_ids == wanted
    three = longctx.generate(model, tokenizer, [text, chat, ids], **common)
    assert three.token_ids[1:] == wanted * 2
    assert len(three.texts) == 3


def test_draws_follow_the_seed(tiny: Any) -> None:
    common: Any = {"decoding": "sample:temperature=2.0", "max_new_tokens": 12, "ignore_eos": True}
    same = [[5, 9, 17]] * 3
    one = longctx.generate(tiny, demo_tokenizer(), same, seed=1, **common)
    assert one == longctx.generate(tiny, demo_tokenizer(), same, seed=1, **common)
    assert one != longctx.generate(tiny, demo_tokenizer(), same, seed=2, **common)
    assert len(set(one.token_ids)) == 3  # each row has draws of its own


def test_draws_are_from_the_probabilities() -> None:
    """Of 2,000 rows, as many take each token as its probability says: χ² with 5 groups."""
    model = build("llama").eval()
    said = longctx.generate(
        model, demo_tokenizer(), [[5, 9, 17]] * 2000, decoding="sample:top_k=5",
        max_new_tokens=1, batch_size=500, ignore_eos=True,
    )  # fmt: skip
    with torch.no_grad():
        top = model(torch.tensor([[5, 9, 17]])).logits[0, -1].topk(5)
    share = top.values.softmax(-1) * 2000
    counts = torch.tensor(
        [sum(row == (token,) for row in said.token_ids) for token in top.indices.tolist()]
    )
    assert counts.sum() == 2000
    assert ((counts - share) ** 2 / share).sum() < 18.5  # p = 0.001 at 4 degrees of freedom


@pytest.mark.parametrize("method", ["yarn:2", "dynamic:2", "alibi", "dual_chunk:2", "sink_window"])
@pytest.mark.parametrize("decoding", ["dry", "contrastive:k=2", "beam:num_beams=2", "chat"])
def test_patches_stay_in_place(method: str, decoding: str) -> None:
    model = build("llama").double().eval()
    parsed = longctx.parse_method(method)
    assert parsed is not None
    long = [[*range(3, 63)], [*range(3, 40)]]
    with longctx.extend(model, parsed):
        common: Any = {"decoding": decoding, "max_new_tokens": 20, "ignore_eos": True}
        if decoding.startswith("beam") or decoding == "chat":
            common["guard"] = "ban"
        else:
            common["guard"] = "mend:copies=2,min_length=3"
        said = longctx.generate(model, demo_tokenizer(), long, **common)
        alone = longctx.generate(model, demo_tokenizer(), long[1], first_row=1, **common)
        assert alone.token_ids[0] == said.token_ids[1]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_are_looked_through() -> None:
    from peft import LoraConfig, get_peft_model

    model = build("llama").eval()
    plain = longctx.generate(model, demo_tokenizer(), PROMPTS, max_new_tokens=6)
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    said = longctx.generate(
        wrapped, demo_tokenizer(), PROMPTS, decoding="contrastive:alpha=0.0", max_new_tokens=6
    )
    assert said == plain


def test_prompts_beyond_the_window_are_refused_by_both_numbers(tiny: Any) -> None:
    with pytest.raises(DataError, match=r"60 tokens and max_new_tokens=5.*65 in all.*window is 64"):
        longctx.generate(tiny, demo_tokenizer(), [[5], [7] * 60], max_new_tokens=5)
    assert longctx.generate(tiny, demo_tokenizer(), [[7] * 59], max_new_tokens=5)
    model = build("llama").eval()
    with longctx.extend(model, "yarn", factor=2):
        assert longctx.generate(model, demo_tokenizer(), [[7] * 60], max_new_tokens=5)
        with pytest.raises(DataError, match="window is 128"):
            longctx.generate(model, demo_tokenizer(), [[7] * 124], max_new_tokens=5)
    with longctx.extend(model, "sink_window", sinks=2, window=20):
        assert longctx.generate(model, demo_tokenizer(), [[7] * 100], max_new_tokens=5)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ((), "no prompts"),
        ("", "prompt 0 is empty"),
        (["Hi", "  \n"], "prompt 1 is empty"),
        ([[5], []], "prompt 1 is empty"),
        (7, "prompts of type int"),
        (None, "prompts of type NoneType"),
        ([None], r"prompt 0 is None"),
        (["Hi", "\ud800"], "prompt 1 holds half a surrogate pair"),
        ([[5, 1.5]], "prompt 0 is"),
        ([[5, 96]], "token 96 is not in the model's vocabulary of 96"),
        ([[-1]], "token -1"),
        ([[True]], "prompt 0 is"),
        ([{"role": "user"}], "lacks a text"),
        ([{"role": "user", "content": "Hi"}], "no chat template"),
        ({"role": "user", "content": "Hi"}, "prompts of type dict"),
        (torch.zeros(2, 2, 2), "prompt 0 is"),
    ],
)
def test_bad_prompts_are_refused(tiny: Any, prompts: Any, message: str) -> None:
    tokenizer = demo_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=message):
        longctx.generate(tiny, tokenizer, prompts, max_new_tokens=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoding": "greddy"}, "did you mean 'greedy'"),
        ({"decoding": "chta"}, "did you mean 'chat'"),
        ({"decoding": "dry:multiplyer=1"}, "did you mean 'multiplier'"),
        ({"decoding": "greedy:temperature=1"}, "greedy has no field 'temperature'"),
        ({"decoding": "sample:top_p=2"}, "top_p=2"),
        ({"decoding": "sample:temperature=0"}, "choose greedy"),
        ({"decoding": "sample:temperature=1e-300"}, "0.001 and more"),
        ({"decoding": "dry:temperature=nan"}, "temperature='nan'"),
        ({"guard": "mend:max_period=1000000000"}, "from 1 to 65,536"),
        ({"decoding": "sample:0.7"}, "expected field=value"),
        ({"decoding": "beam:num_beams=1"}, "num_beams=1"),
        ({"decoding": "noise:where=weights"}, "where='weights'"),
        ({"decoding": "noise:sd=0"}, "above 0"),
        ({"decoding": "noise:sd=1e308"}, "above 0 to 1000"),
        ({"decoding": "penalty:penalty=1e308"}, "from 1 to 1000"),
        ({"decoding": f"dry:allowed={10**20}"}, "1 or more, and at most 2,147,483,648"),
        ({"decoding": "contrastive:k=97"}, "the model has 96 tokens to choose from"),
        ({"guard": f"mend:copies={10**20}"}, "from 2 to 65,536"),
        ({"guard": f"ban:min_length={10**20}"}, "at most 2,147,483,648"),
        ({"guard": "mend:temperature=1e300"}, "above 0 to 1000"),
        ({"decoding": Dry}, "expected a decoding such as"),
        ({"decoding": None}, "expected a decoding such as"),
        ({"decoding": 3}, "expected a decoding such as"),
        ({"guard": 3}, "expected a LoopGuard"),
        ({"guard": "mnd"}, "did you mean 'mend'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "x"}, "seed='x'"),
        ({"stream": "yes"}, "expected a function"),
        ({"ignore_eos": 1}, "True or False"),
        ({"first_row": -2}, "first_row=-2"),
    ],
)
def test_bad_settings_are_refused(tiny: Any, settings: Any, message: str) -> None:
    with pytest.raises(RunError, match=message):
        longctx.generate(tiny, demo_tokenizer(), [[5]], **settings)


def test_memory_that_runs_out_is_said(tiny: Any) -> None:
    def full(module: Any, args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = tiny.register_forward_pre_hook(full)
    try:
        with pytest.raises(RunError, match="batch_size=3: pass a smaller one"):
            longctx.generate(tiny, demo_tokenizer(), PROMPTS, batch_size=3, max_new_tokens=2)
    finally:
        handle.remove()


def test_models_that_cannot_be_gone_on_with_are_refused(tiny: Any) -> None:
    with pytest.raises(ModelError, match="has no head that says tokens"):
        longctx.generate(tiny.model, demo_tokenizer(), [[5]])
    broken = build("llama").eval()
    with torch.no_grad():
        broken.lm_head.weight[7] = torch.nan
    for decoding in ("greedy", "beam", "contrastive", "sample"):
        with pytest.raises(ModelError, match="after 2 tokens are NaN"):
            longctx.generate(
                broken, demo_tokenizer(), [[5, 6]], decoding=decoding, max_new_tokens=4
            )


def test_without_a_length_a_row_fills_the_window_at_most(tiny: Any) -> None:
    tokenizer = demo_tokenizer()
    said = longctx.generate(tiny, tokenizer, [[7] * 60, [5]], ignore_eos=True)
    assert [len(row) for row in said.token_ids] == [4, 4]  # the window has 64
    with pytest.raises(DataError, match="has 64 tokens and max_new_tokens=1 are to"):
        longctx.generate(tiny, tokenizer, [[7] * 64])


@pytest.mark.parametrize("decoding", ["greedy", "beam", "contrastive", "sample"])
@pytest.mark.parametrize("ends", [-1, 5000, [13, 5000, -1], []])
def test_ends_that_are_not_tokens_change_nothing(tiny: Any, decoding: str, ends: Any) -> None:
    common: Any = {"decoding": decoding, "max_new_tokens": 8}
    free = longctx.generate(tiny, demo_tokenizer(), PROMPTS, ignore_eos=True, **common)
    kept = tiny.generation_config
    tiny.generation_config = GenerationConfig(eos_token_id=ends)
    try:
        said = longctx.generate(tiny, demo_tokenizer(), PROMPTS, **common)
        # One row ends at once, and is filled up while the others go on.
        tiny.generation_config = GenerationConfig(eos_token_id=[5000, free.token_ids[0][0]])
        ended = longctx.generate(tiny, demo_tokenizer(), PROMPTS, **common)
    finally:
        tiny.generation_config = kept
    for row, whole in zip(said.token_ids, free.token_ids, strict=True):
        assert row == whole[: len(row)]
        assert len(row) == 8 or whole[len(row)] in (13, demo_tokenizer().eos_token_id)
    assert ended.finish_reasons[0] == "eos"


def test_a_tokenizer_of_another_model_is_refused(tiny: Any) -> None:
    _, tokenizer = longctx.load("demo")
    with pytest.raises(DataError, match="the tokenizer that the model came with"):
        longctx.generate(tiny, tokenizer, "The parser reads on", max_new_tokens=2)


def test_a_decoding_is_one_file() -> None:
    found = entries("longctx.generation.decodings", "DECODING")
    assert tuple(entry.name for entry in found) == longctx.available_decodings()
    for entry in found:
        assert decoding_class(entry.name).name == entry.name
        assert "When to use it" in entry.text
        assert "Source: " in entry.text
        assert all(field.doc for field in entry.fields)
        assert parse_decoding(entry.example()) is not None
    assert parse_decoding("greedy") == Greedy()
    assert parse_decoding("dry:breakers=('\\n', 'so')") == Dry(breakers=("\n", "so"))
    assert parse_decoding("chat:temperature=0.5") == Dry(temperature=0.5, top_p=0.9)
