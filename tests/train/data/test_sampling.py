"""Rows by number: the same whatever was read before, at the step's length, in the wanted shares."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from datasets import Dataset

from longctx.errors import DataError, RunError, TooShortError
from longctx.prompts.haystacks import Grass, Texts, held_in
from longctx.prompts.passkey_prompts import split_of
from longctx.train.data.passkeys import Passkeys
from longctx.train.data.sampling import DocumentSource, Epochs, Mixture, MixtureWeight
from longctx.train.data.tokenize import IGNORED
from longctx.train.positions import FullLength, LengthSchedule

BOS = 1


def dataset(lengths: list[int]) -> Dataset:
    ids = [[BOS, *range(100 * n, 100 * n + length - 1)] for n, length in enumerate(lengths)]
    labels = [[IGNORED, *row[1:]] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@dataclass(frozen=True)
class Constant:
    """A source of one token."""

    token: int

    def document(self, tokens: int, rng: Random) -> tuple[list[int], list[int]]:
        return [self.token] * tokens, [self.token] * tokens


def mixture(shares: tuple[float, ...] = (1.0, 1.0), rows: int = 40) -> Mixture:
    sources = [MixtureWeight(str(n), Constant(n), share) for n, share in enumerate(shares)]
    policy = LengthSchedule(8, 64, 16)
    return Mixture(sources, rows=rows, rows_per_step=2, row_tokens=64, positions=policy)


def test_every_row_comes_once_an_epoch_in_another_order() -> None:
    train_dataset = Epochs(dataset([3, 4, 5, 6, 7, 8, 9]), rows=21, seed=3)
    orders = [
        [len(train_dataset[7 * epoch + i]["input_ids"]) for i in range(7)] for epoch in range(3)
    ]
    assert all(sorted(order) == [3, 4, 5, 6, 7, 8, 9] for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert {train_dataset[i]["draw"] for i in range(7, 14)} == {1}


def test_a_row_does_not_depend_on_what_was_read_before() -> None:
    first = Epochs(dataset([3, 4, 5, 6]), rows=12)
    again = Epochs(dataset([3, 4, 5, 6]), rows=12)
    assert [first[i] for i in range(12)] == [again[i] for i in reversed(range(12))][::-1]
    drawn, other = mixture(), mixture()
    assert [drawn[i] for i in range(40)] == [other[i] for i in reversed(range(40))][::-1]


def test_documents_have_the_length_of_the_step() -> None:
    train_dataset = mixture()
    for index in range(len(train_dataset)):
        wanted = train_dataset.positions.tokens(index // 2)
        assert wanted is not None
        assert train_dataset[index]["seq_lengths"] == [wanted] * (64 // wanted)


@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (0.5, 0.3, 0.2)])
def test_kinds_come_as_often_as_their_shares_say(shares: tuple[float, ...]) -> None:
    train_dataset = mixture(shares, rows=1000)
    kinds = [kind for i in range(1000) for kind in train_dataset[i]["kinds"]]
    for kind, share in enumerate(shares):
        assert kinds.count(kind) / len(kinds) == pytest.approx(share / sum(shares), abs=0.01)
    # Within every step too, where it holds enough documents.
    early = [train_dataset[i]["kinds"] for i in (0, 1)]
    assert {kind for row in early for kind in row} == set(range(len(shares)))


def test_one_document_to_a_row_alternates_between_two_sources() -> None:
    rows = [mixture()[i]["kinds"] for i in range(32, 40)]
    assert rows == [[0], [1]] * 4


def test_a_stretch_of_a_long_row_holds_something_to_learn_after_its_first_token() -> None:
    rows = dataset([300])
    labels = [[IGNORED] * 200 + list(range(200, 205)) + [IGNORED] * 95]
    rows = rows.remove_columns("labels").add_column("labels", labels)  # pyright: ignore[reportArgumentType]
    starts: set[int] = set()
    for seed in range(200):
        ids, learnt = DocumentSource(rows, keep=BOS).document(20, Random(seed))
        assert len(ids) == len(learnt) == 20
        assert ids[0] == BOS
        assert learnt[0] == IGNORED
        assert any(label != IGNORED for label in learnt[1:])
        assert ids[1:] == list(range(ids[1], ids[1] + 19))
        starts.add(ids[1])
    assert len(starts) > 15


def test_short_rows_come_whole() -> None:
    ids, labels = DocumentSource(dataset([9]), keep=7).document(20, Random(0))
    assert ids[0] == BOS
    assert len(ids) == len(labels) == 9


def test_a_source_that_gives_too_much_is_named() -> None:
    class Long(Constant):
        def document(self, tokens: int, rng: Random) -> tuple[list[int], list[int]]:
            return super().document(tokens + 1, rng)

    train_dataset = Mixture(
        [MixtureWeight("long", Long(1), 1)],
        rows=1,
        rows_per_step=1,
        row_tokens=8,
        positions=FullLength(),
    )
    with pytest.raises(DataError, match="source long gave 9 tokens and 9 labels where at most 8"):
        train_dataset[0]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(RunError, match=r"share=0 of x: expected a number above 0"):
        MixtureWeight("x", Constant(1), 0)
    with pytest.raises(RunError, match="0 rows of a dataset of 1"):
        Epochs(dataset([3]), rows=0)
    with pytest.raises(RunError, match="from 0 sources"):
        Mixture([], rows=1, rows_per_step=1, row_tokens=8, positions=FullLength())


@pytest.mark.parametrize("length", [64, 256, 1024])
def test_passkeys_to_learn_are_of_the_training_split_with_loss_on_the_key(length: int) -> None:
    from longctx import load

    _, tokenizer = load("demo")
    source = Passkeys(tokenizer, held_in(), grass=0.0, shorter=0.0)
    grass = Grass().line
    for seed in range(5):
        ids, labels = source.document(length, Random(seed))
        learnt = [label for label in labels if label != IGNORED]
        key = str(tokenizer.decode(learnt)).strip()
        assert len(ids) == len(labels) == length
        assert ids[-len(learnt) :] == learnt
        assert split_of(key) == "train"
        assert key in tokenizer.decode(ids[: -len(learnt)])
        assert grass not in tokenizer.decode(ids)


def test_passkeys_may_also_hide_in_filler_sentences() -> None:
    from longctx import load

    _, tokenizer = load("demo")
    source = Passkeys(tokenizer, Texts(("no such text",)), grass=1.0)
    drawn = {str(tokenizer.decode(source.document(128, Random(n))[0]))[5:30] for n in range(20)}
    assert len(drawn) > 3  # several fillers, none of them the evaluation's
    assert not any("grass" in text for text in drawn)


@pytest.mark.parametrize("times", [5, 9])
def test_where_a_tokenizer_takes_more_the_prompts_are_longer_and_rows_end_sooner(
    times: int,
) -> None:
    """Such lengths came by chance, and ended a training long after its start."""
    from longctx import load

    _, tokenizer = load("demo")
    tokenizer.chat_template = "You say. " * times + "{{ messages[0].content }}"
    source = Passkeys(tokenizer, held_in(), shorter=1.0)
    with pytest.raises(TooShortError, match=r"length=64 is too short .* at least \d+ tokens"):
        source.document(64, Random(0))
    sizes = [len(source.document(256, Random(n))[0]) for n in range(20)]
    assert min(sizes) > 64
    assert len(set(sizes)) > 5
    keys = [MixtureWeight("keys", source, 1)]
    rows = Mixture(keys, rows=20, rows_per_step=1, row_tokens=256, positions=FullLength())
    assert all(64 < len(rows[n]["input_ids"]) <= 256 for n in range(20))
    short = Mixture(keys, rows=1, rows_per_step=1, row_tokens=64, positions=FullLength())
    with pytest.raises(TooShortError):
        short[0]
