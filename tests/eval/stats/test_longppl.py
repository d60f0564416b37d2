"""LongPPL and the curve by position, worked by hand and again token by token."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.errors import RunError
from longctx.eval import Perplexity, sweep
from longctx.eval.stats.intervals import mean_interval
from longctx.eval.stats.longppl import key_tokens, long_ppl, position_curve

from ..conftest import byte_model, byte_tokenizer

Scored = tuple[str, str, int, int, float]


def table(rows: list[Scored], *, context: int | None = None) -> Any:  # pandas has no exact types
    """Rows of method, document, length, index, NLL; the token is the index and 100."""
    columns = ["method", "document", "length", "index", "nll"]
    frame = pd.DataFrame(rows, columns=columns)
    frame["token"] = frame["index"] + 100
    frame["context"] = frame["length"] - 1 if context is None else context
    return frame


BY_HAND = table([
    # document, index: evaluator gains 3.0 and ends at −1.0; a key
    ("big", "a", 64, 0, 4.0), ("big", "a", 512, 0, 1.0),
    # gains exactly 2.0: none, the threshold is strict
    ("big", "a", 64, 1, 3.0), ("big", "a", 512, 1, 1.0),
    # gains 4.0 and ends at −2.0: none, strict too
    ("big", "b", 64, 0, 6.0), ("big", "b", 512, 0, 2.0),
    # gains 2.5 and ends at −0.5: a key
    ("big", "b", 64, 1, 3.0), ("big", "b", 512, 1, 0.5),
    ("small", "a", 64, 0, 5.0), ("small", "a", 512, 0, 3.0),
    ("small", "a", 64, 1, 1.0), ("small", "a", 512, 1, 1.0),
    ("small", "b", 64, 0, 1.0), ("small", "b", 512, 0, 1.0),
    ("small", "b", 64, 1, 7.0), ("small", "b", 512, 1, 4.0),
])  # fmt: skip


def test_key_tokens_by_hand() -> None:
    keys: Any = key_tokens(BY_HAND, evaluator="big", long=512, short=64)
    assert keys[["document", "index", "token"]].to_numpy().tolist() == [
        ["a", 0, 100],
        ["b", 1, 101],
    ]
    assert keys["log_p"].tolist() == [-1.0, -0.5]
    assert keys["log_p_short"].tolist() == [-4.0, -3.0]
    more = key_tokens(BY_HAND, evaluator="big", long=512, short=64, gain=1.9, floor=-2.1)
    assert len(more) == 4


def test_long_ppl_by_hand() -> None:
    keys: Any = key_tokens(BY_HAND, evaluator="big", long=512, short=64)
    found: Any = long_ppl(BY_HAND, keys).set_index(["method", "length"])
    assert len(found) == 4
    row = found.loc[("small", 512)]
    assert row["value"] == pytest.approx(math.exp((3.0 + 4.0) / 2))
    assert math.isnan(row["low"])  # two documents of one key each are too few for an interval
    assert (row["keys"], row["documents"], row["targets"], row["share"]) == (2, 2, 4, 0.5)
    assert found.loc[("big", 64), "value"] == pytest.approx(math.exp(3.5))
    assert found.loc[("big", 512), "value"] == pytest.approx(math.exp(0.75))
    one = long_ppl(BY_HAND, keys[:1])
    assert one["low"].isna().tolist() == [True] * 4


nlls = st.lists(
    st.tuples(st.sampled_from("abc"), st.floats(0, 9, width=16), st.floats(0, 9, width=16)),
    min_size=1,
    max_size=30,
)


@settings(deadline=None, max_examples=40)
@given(nlls, st.floats(0, 3), st.floats(-4, 0))
def test_keys_are_those_that_a_loop_finds(
    drawn: list[tuple[str, float, float]], gain: float, floor: float
) -> None:
    rows: list[Scored] = []
    wanted: dict[tuple[str, int], float] = {}
    for index, (document, short, long) in enumerate(drawn):
        rows += [("m", document, 64, index, short), ("m", document, 512, index, long)]
        if short - long > gain and -long > floor:
            wanted[document, index] = long
    tokens = table(rows).sample(frac=1, random_state=0)
    ask: dict[str, Any] = {"evaluator": "m", "long": 512, "short": 64, "gain": gain, "floor": floor}
    if not wanted:
        with pytest.raises(RunError, match=f"none of {len(drawn)} tokens is a key"):
            key_tokens(tokens, **ask)
        return
    keys: Any = key_tokens(tokens, **ask)
    assert set(zip(keys["document"], keys["index"], strict=True)) == set(wanted)
    value = long_ppl(tokens, keys).set_index("length").loc[512, "value"]
    assert value == pytest.approx(math.exp(sum(wanted.values()) / len(wanted)))


def test_every_token_a_key_is_perplexity(texts: tuple[str, ...], tmp_path: Any) -> None:
    task = Perplexity(last=60, stride=20, windows=4, text=texts)
    result = sweep(
        byte_model(), byte_tokenizer(), [task], (100, 300), methods=["none", "yarn:2"],
        results=tmp_path / "results.jsonl", progress=False,
    )  # fmt: skip
    tokens = result.per_token()
    keys: Any = key_tokens(tokens, evaluator="none", long=300, short=100, gain=-1e9, floor=-1e9)
    assert len(keys) == 240
    found: Any = long_ppl(tokens, keys).set_index(["method", "length"])
    assert found["share"].eq(1).all()
    for row in result.rows:
        ours = found.loc[(row.method, row.length)]
        assert ours["value"] == pytest.approx(row.value, rel=1e-5)
        assert ours["low"] == pytest.approx(row.low, rel=1e-4)
        assert ours["high"] == pytest.approx(row.high, rel=1e-4)


def test_what_is_missing_is_named() -> None:
    ask: Any = {"evaluator": "big", "long": 512, "short": 64}

    def changed(**other: Any) -> Any:
        return ask | other

    with pytest.raises(RunError, match=r"method 'bog'; did you mean 'big'\? \(there: big, small\)"):
        key_tokens(BY_HAND, **changed(evaluator="bog"))
    with pytest.raises(RunError, match=r"length 1024 \(there: 64, 512\)"):
        key_tokens(BY_HAND, **changed(long=1024))
    with pytest.raises(RunError, match="expected the short context to be shorter"):
        key_tokens(BY_HAND, **changed(long=64))
    with pytest.raises(RunError, match=r"none of 4 tokens is a key.* is 4\.00 nats"):
        key_tokens(BY_HAND, **ask, gain=5.0)
    apart = BY_HAND[(BY_HAND["length"] == 64) == (BY_HAND["index"] == 0)]
    with pytest.raises(RunError, match="share no scored token"):
        key_tokens(apart, **ask)
    with pytest.raises(RunError, match="scored twice"):
        key_tokens(pd.concat([BY_HAND, BY_HAND]), **ask)
    other = BY_HAND.assign(token=range(len(BY_HAND)))
    with pytest.raises(RunError, match="two texts"):
        key_tokens(other, **ask)
    keys: Any = key_tokens(BY_HAND, **ask)
    with pytest.raises(RunError, match="'small' at 512 lacks 1 of 2 keys"):
        long_ppl(BY_HAND[:-1], keys)
    with pytest.raises(RunError, match="no key tokens"):
        long_ppl(BY_HAND, keys[:0])


def test_position_curve_by_hand() -> None:
    tokens = pd.concat([
        table([("m", "a", 9, 0, 1.0), ("m", "b", 9, 0, 3.0), ("m", "c", 9, 0, 2.0)], context=1),
        table([("m", "a", 9, 1, 5.0)], context=3),
        table([("m", "a", 9, 2, 7.0)], context=4),
    ])  # fmt: skip
    curve: Any = position_curve(tokens, 2)
    assert curve[["start", "end", "nll", "targets", "documents"]].to_numpy().tolist() == [
        [1, 3, 2.0, 3, 3],
        [3, 5, 6.0, 2, 1],
    ]
    # three documents: standard error 1/√3, t of two degrees of freedom 4.30265
    assert curve["low"][0] == pytest.approx(2 - 4.30265 / math.sqrt(3), rel=1e-4)
    assert math.isnan(curve["low"][1])
    own = position_curve(tokens, [2, 4])
    assert own[["start", "end", "nll"]].to_numpy().tolist() == [[2, 4, 5.0]]
    assert len(position_curve(tokens, 100)) == 3, "no bin is narrower than a token"


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 9)), min_size=1), st.integers(1, 12))
def test_bins_hold_every_token_once(drawn: list[tuple[int, float]], bins: int) -> None:
    tokens = table([("m", str(i % 3), 64, i, nll) for i, (_, nll) in enumerate(drawn)])
    tokens["context"] = [context for context, _ in drawn]
    curve: Any = position_curve(tokens, bins)
    assert curve["targets"].sum() == len(drawn)
    assert len(curve) <= bins
    for row in curve.to_dict(orient="records"):
        inside = [
            (nll, str(i % 3))
            for i, (context, nll) in enumerate(drawn)
            if row["start"] <= context < row["end"]
        ]
        mean, _, high = mean_interval(
            [n for n, _ in inside], [1.0] * len(inside), [d for _, d in inside]
        )
        assert row["nll"] == pytest.approx(mean)
        assert row["high"] == pytest.approx(high, nan_ok=True)


def test_bins_that_are_none() -> None:
    with pytest.raises(RunError, match="bins=0"):
        position_curve(BY_HAND, 0)
    with pytest.raises(RunError, match="each above the last"):
        position_curve(BY_HAND, [5, 5])
    with pytest.raises(RunError, match="no scored tokens"):
        position_curve(BY_HAND[:0], 3)
