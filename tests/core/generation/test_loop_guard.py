"""The loop guard: its ban against brute force, and rows that are mended."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch

import longctx
from longctx.errors import RunError
from longctx.generation.loop_guard import BanProcessor, LoopGuard, LoopTracker, parse_guard
from longctx.generation.result import Generated

from ...families import build
from ...test_matrix import demo_tokenizer
from .calls import call, process

PROMPTS = ["The parser reads the file and", "Once", "A list is a"]


def loops(tokens: Sequence[int], guard: LoopGuard) -> int | None:
    """The smallest period that the tail repeats with, often and long enough."""
    for period in range(1, guard.max_period + 1):
        needed = max(guard.copies * period, guard.min_length)
        tail = tokens[len(tokens) - needed :] if needed <= len(tokens) else []
        if tail and all(tail[i] == tail[i - period] for i in range(period, needed)):
            return period
    return None


def test_the_ban_is_brute_force_at_ten_thousand_steps() -> None:
    random, steps, banned = Random(0), 0, 0
    for case in range(50):
        copies, least = random.choice([2, 3]), random.choice([1, 4, 7])
        guard = LoopGuard(mode="ban", copies=copies, min_length=least, max_period=6)
        start, vocabulary = random.randrange(1, 5), 5
        row = [random.randrange(vocabulary) for _ in range(start)]
        processor = BanProcessor(guard, call([0], [start]))
        for _ in range(200):
            if case % 5 == 0 and random.random() < 0.1 and len(row) > start + 3:
                row = row[:-2]  # cut back
            ids = torch.tensor([row])
            allowed = process(processor, ids, torch.zeros(1, vocabulary))[0] > -torch.inf
            wanted = [loops([*row[start:], t], guard) is None for t in range(vocabulary)]
            assert allowed.tolist() == wanted
            banned += vocabulary - sum(wanted)
            free = [t for t in range(vocabulary) if wanted[t]]
            near = row[-random.randrange(1, min(4, len(row)) + 1)]
            row.append(near if near in free and random.random() < 0.8 else random.choice(free))
            steps += 1
    assert steps == 10_000
    assert banned > 1_000


def test_the_tracker_knows_what_a_loop_would_be_cut_by() -> None:
    guard, random = LoopGuard(copies=3, min_length=1, max_period=5), Random(4)
    for _ in range(40):
        tracker, row = LoopTracker(guard), list[int]()
        for _ in range(400):
            row.append(random.choice([*row[-3:], random.randrange(9)]))
            tracker.push(row[-1])
            period = loops(row, guard)
            assert (tracker.loop is None) == (period is None)
            if tracker.loop is not None:
                assert tracker.loop[0] == period
                assert tracker.loop[1] <= tracker.unsettled
                break


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return longctx.load("demo-tuned")


def shown_by(demo: tuple[Any, Any], **settings: Any) -> Generated:
    """Generate, and hold the stream to what comes out: no character is taken back."""
    pieces: dict[int, str] = {}

    def show(row: int, text: str) -> None:
        assert text
        pieces[row] = pieces.get(row, "") + text

    settings = {"max_new_tokens": 120, **settings}
    said = longctx.generate(*demo, PROMPTS, stream=show, ignore_eos=True, **settings)
    assert tuple(pieces.get(row, "") for row in range(len(PROMPTS))) == said.texts
    return said


@pytest.mark.parametrize(
    ("decoding", "strategy"),
    [
        ("greedy", "resample"),
        ("greedy", "split"),
        ("greedy", "marker"),
        ("contrastive:k=3,alpha=0.1", "resample"),
        ("sample:temperature=0.3", "split"),
        pytest.param("contrastive:k=3,alpha=0.1", "split", marks=pytest.mark.slow),
        pytest.param("contrastive:k=3,alpha=0.1", "marker", marks=pytest.mark.slow),
        pytest.param("sample:temperature=0.3", "resample", marks=pytest.mark.slow),
        pytest.param("sample:temperature=0.3", "marker", marks=pytest.mark.slow),
    ],
)
def test_mended_rows_hold_no_loop(demo: tuple[Any, Any], decoding: str, strategy: Any) -> None:
    guard = LoopGuard(strategy=strategy)
    said = shown_by(demo, decoding=decoding, guard=guard)
    for row, tokens in enumerate(said.token_ids):
        events = [event for event in said.events if event.row == row]
        assert all(loops(tokens[:end], guard) is None for end in range(len(tokens) + 1))
        gave_up = [event for event in events if event.kind == "gave up"]
        assert bool(gave_up) == (said.finish_reasons[row] == "loop")
        assert len(tokens) == 120 or gave_up
    if decoding == "greedy":
        plain = shown_by(demo, decoding=decoding)
        assert any(loops(tokens, guard) for tokens in plain.token_ids)
        assert {"loop", "retry"} <= {event.kind for event in said.events}


def test_a_mended_row_does_not_depend_on_its_batch(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    model = model.double()
    try:
        common: Any = {"guard": "mend", "max_new_tokens": 90, "ignore_eos": True, "seed": 3}
        together = longctx.generate(model, tokenizer, PROMPTS, **common)
        for row, prompt in enumerate(PROMPTS):
            alone = longctx.generate(model, tokenizer, prompt, first_row=row, **common)
            assert alone.token_ids[0] == together.token_ids[row]
            assert [e.detail for e in alone.events] == [
                e.detail for e in together.events if e.row == row
            ]
    finally:
        model.float()


def test_what_cannot_be_mended_ends_with_a_loop_and_says_so() -> None:
    """A model that knows one token only."""
    model = build("llama").eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 1.0
        model.model.norm.weight.fill_(1.0)
    hidden = model.model.norm

    def same(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.full_like(output, 10.0)

    handle = hidden.register_forward_hook(same)
    said = longctx.generate(
        model, demo_tokenizer(), [[5, 6]], guard="mend:retries=2,min_length=4,copies=2",
        max_new_tokens=30, ignore_eos=True,
    )  # fmt: skip
    handle.remove()
    assert said.token_ids == ((7,),)
    assert said.finish_reasons == ("loop",)
    kinds = [event.kind for event in said.events]
    assert kinds == ["loop", "retry", "loop", "retry", "loop", "gave up"]


def test_rows_that_are_mended_together_stay_in_the_window(demo: tuple[Any, Any]) -> None:
    """All of a call go on until the last ends, and a table of positions has no more than it has."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=1024, n_positions=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).double().eval()
    common: Any = {"guard": "mend:copies=2,min_length=4", "max_new_tokens": 30, "ignore_eos": True}
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20], [30, 31, 32]]
    said = longctx.generate(model, demo[1], prompts, **common)
    assert said.events
    for row, prompt in enumerate(prompts):
        alone = longctx.generate(model, demo[1], prompt, first_row=row, **common)
        assert alone.token_ids[0] == said.token_ids[row]


def test_the_first_settings_come_back(demo: tuple[Any, Any]) -> None:
    said = shown_by(demo, guard="mend:recover_after=10")
    stretches: dict[int, list[int]] = {}
    begun = 0
    for event in said.events:
        if event.kind == "retry":
            begun = event.position
        elif event.kind == "recovered":
            stretches.setdefault(event.row, []).append(event.position - begun)
    # Twice as many tokens at each further place where a row loops.
    assert all(row[0] == 10 and set(row) <= {10, 20, 40, 80} for row in stretches.values())
    assert any(len(set(row)) > 1 for row in stretches.values())


def test_the_ban_holds_for_beams(demo: tuple[Any, Any]) -> None:
    guard = LoopGuard(mode="ban", copies=2, min_length=4, max_period=16)
    said = shown_by(demo, decoding="beam:num_beams=3", guard=guard, max_new_tokens=40)
    for tokens in said.token_ids:
        assert all(loops(tokens[:end], guard) is None for end in range(len(tokens) + 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mnd", "did you mean 'mend'"),
        ("mend:copis=3", "did you mean 'copies'"),
        ("mend:copies=1", "copies=1"),
        ("mend:copies=three", "copies='three'"),
        ("mend:temperature=0", "temperature=0"),
        ("mend:strategy=splt", "did you mean 'split'"),
        ("mend:marker=x", "no effect"),
        ("mend:strategy=split,split_with=''", "not empty"),
        ("ban:retries=3", "no effect with mode='ban'"),
        ("mend:3", "expected field=value"),
    ],
)
def test_settings_are_checked(text: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        parse_guard(text)


def test_beams_are_not_mended(demo: tuple[Any, Any]) -> None:
    with pytest.raises(RunError, match="use the guard 'ban'"):
        longctx.generate(*demo, "Once", decoding="beam", guard="mend")
    assert parse_guard("none") is None
