"""Names and topics are the evaluation's, and not those that training draws."""

from __future__ import annotations

from random import Random

from longctx.eval.tasks.shared import vocabulary
from longctx.prompts.passkey_prompts import split_of
from longctx.train.data.synthetic import Synthetic, conversations


def test_all_are_of_the_evaluation() -> None:
    assert len(vocabulary.names()) > 5000
    assert len(vocabulary.topics()) > 400
    assert {split_of(name) for name in vocabulary.names()} == {"eval"}
    rng = Random(0)
    assert {split_of(vocabulary.number(rng, 5)) for _ in range(50)} == {"eval"}
    assert {split_of(vocabulary.variable(rng)) for _ in range(50)} == {"eval"}
    assert vocabulary.number(
        Random(0), 5, taken=[vocabulary.number(Random(0), 5)]
    ) != vocabulary.number(Random(0), 5)


def test_lists() -> None:
    assert vocabulary.listed(["a", "b"]) == "a and b"
    assert vocabulary.listed(["a", "b", "c"]) == "a, b, and c"


def test_training_has_none_of_them() -> None:
    topics = {f"the {aspect} of {subject}" for aspect, subject in vocabulary.topics()}
    for record in conversations(20, seed=0, settings=Synthetic(shortest=8000)):
        text = " ".join(turn["value"] for turn in record["conversations"])
        names = {part.partition(":")[0] for part in text.split("line ")}
        assert not names & set(vocabulary.names())
        assert not [topic for topic in topics if f"{topic}." in text]
