"""Reading in pieces against plain forms of the same: full forwards without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import longctx
from longctx.cli.main import main
from longctx.errors import DataError, LongctxError, ModelError, RunError
from longctx.eval import Passkey, sweep
from longctx.prompts import CLASSIC, Grass, passkey
from longctx.prompts.haystacks import decode
from longctx.reading.combine_nbce import BETA
from longctx.reading.combine_windows import read_side_by_side
from longctx.reading.pieces import Piece, split
from longctx.reading.question import Question
from longctx.reading.read import Reading, answer_in_pieces

from ...families import build

WORDS: dict[str, Any] = {"intro": CLASSIC.intro, "answer_prefix": "The pass key is "}


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return longctx.load("demo")


@pytest.fixture(scope="module")
def hidden(demo: tuple[Any, Any]) -> tuple[str, str]:
    """A document of about 500 tokens and its key."""
    prompt = passkey(demo[1], 600, depth=0.7, seed=3, haystack=Grass())
    assert prompt.document is not None
    return decode(demo[1], prompt.input_ids[slice(*prompt.document)]), prompt.key


def question(tokenizer: Any) -> Question:
    return Question.of(tokenizer, "What is the pass key?", **WORDS)


def test_map_finds_a_key_and_its_place(demo: tuple[Any, Any], hidden: tuple[str, str]) -> None:
    document, key = hidden
    seen: list[tuple[int, int]] = []
    answer = longctx.read(
        *demo,
        document,
        "What is the pass key?",
        chunk=180,
        overlap=48,
        max_new_tokens=5,
        batch_size=2,
        progress=lambda done, there: seen.append((done, there)),
        **WORDS,
    )
    assert answer.text == key
    assert answer.literal
    assert answer.place is not None
    assert document[slice(*answer.place)] == key
    assert seen[-1] == (len(answer.pieces), len(answer.pieces))
    best = max(answer.pieces, key=lambda piece: piece.surety or -torch.inf)
    assert best.start <= answer.place[0] < answer.place[1] <= best.stop


@torch.no_grad()
def test_how_sure_a_piece_is(demo: tuple[Any, Any], hidden: tuple[str, str]) -> None:
    """The mean log-probability of its own tokens, by full forwards of each piece alone."""
    model, tokenizer = demo
    asked = question(tokenizer)
    reading = Reading("map", 180, 48, 3)
    answer = answer_in_pieces(model, tokenizer, hidden[0], asked, reading, max_new_tokens=5)
    pieces = split(tokenizer, hidden[0], 180, 48)
    for piece, found in zip(pieces, answer.pieces, strict=True):
        ids, logs = [*asked.about(piece.ids)], []
        for _ in range(5):
            log_p = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            logs.append(float(log_p.max()))
            ids.append(int(log_p.argmax()))
        assert found.surety == pytest.approx(sum(logs) / 5, abs=1e-4)


@torch.no_grad()
def test_nbce_is_its_formula(demo: tuple[Any, Any], hidden: tuple[str, str]) -> None:
    """In float64, by full forwards without cache or padding."""
    model, tokenizer = demo
    asked = question(tokenizer)
    reading = Reading("nbce", 180, 48)
    answer = answer_in_pieces(model, tokenizer, hidden[0], asked, reading, max_new_tokens=5)
    pieces = split(tokenizer, hidden[0], 180, 48)
    rows = [[*asked.about(())], *([*asked.about(piece.ids)] for piece in pieces)]
    said: list[int] = []
    for _ in range(5):
        log_p = [model(torch.tensor([row])).logits[0, -1].double().log_softmax(-1) for row in rows]
        entropies = [float(-(p.exp() * p).sum()) for p in log_p[1:]]
        surest = log_p[1:][entropies.index(min(entropies))]
        said.append(int(((1 + BETA) * surest - BETA * log_p[0]).argmax()))
        rows = [[*row, said[-1]] for row in rows]
    assert list(answer.token_ids) == said


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_windows_are_one_masked_forward(family: str) -> None:
    """Each piece sees itself, the question all of them, at the positions of the longest."""
    model = build(family).eval()
    asked = Question((5,), (7, 8, 9))
    pieces = [Piece(0, 1, tuple(range(10, 18))), Piece(1, 2, tuple(range(20, 31)))]
    said = read_side_by_side(
        model, asked, pieces, max_new_tokens=4, ends=(), advance=lambda count: None
    )
    parts = [[*asked.before, *piece.ids] for piece in pieces]
    tail, found = [*asked.after], []
    for _ in range(4):
        ids = [*parts[0], *parts[1], *tail]
        first, both = len(parts[0]), len(parts[0]) + len(parts[1])
        mask = torch.ones(len(ids), len(ids)).tril().bool()
        mask[first:both, :first] = False
        start = max(map(len, parts))
        positions = [*range(first), *range(len(parts[1])), *range(start, start + len(tail))]
        logits = model(
            torch.tensor([ids]),
            attention_mask=mask[None, None],
            position_ids=torch.tensor([positions]),
        ).logits[0, -1]
        found.append(int(logits.argmax()))
        tail.append(found[-1])
    assert list(said) == found


def test_windows_refuse_what_they_cannot_join(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    with (
        longctx.extend(model, "dual_chunk", factor=4),
        pytest.raises(ModelError, match=r"dual_chunk does not allow.*combine='map'"),
    ):
        longctx.read(model, tokenizer, "One. Two.", "What?", combine="windows")
    sliding = build("gemma3").eval()
    with pytest.raises(ModelError, match="sliding"):
        read_side_by_side(
            sliding,
            Question((5,), (7,)),
            [Piece(0, 1, (9, 8))],
            max_new_tokens=1,
            ends=(),
            advance=lambda count: None,
        )


def test_under_a_method_pieces_are_longer(demo: tuple[Any, Any], hidden: tuple[str, str]) -> None:
    model, tokenizer = demo
    asked = question(tokenizer)
    before = Reading().pieces(model, tokenizer, hidden[0], asked, 5)
    with longctx.extend(model, "yarn", factor=4):
        after = Reading().pieces(model, tokenizer, hidden[0], asked, 5)
    assert len(before) > len(after) == 1


def test_a_summary_ends_in_one(demo: tuple[Any, Any], hidden: tuple[str, str]) -> None:
    found = longctx.summarise(*demo, hidden[0], chunk=120, max_new_tokens=12)
    assert len(found.rounds[0]) > len(found.rounds[-1]) == 1
    assert found.rounds[-1][0] == found.text
    with pytest.raises(RunError, match="still fill"):
        longctx.summarise(*demo, hidden[0], chunk=60, max_new_tokens=60)


@pytest.mark.parametrize(
    ("settings", "error", "found"),
    [
        ({"document": " "}, DataError, "document is empty"),
        ({"document": 3}, DataError, "document is of type int"),
        ({"document": "\udc80"}, DataError, "document holds half a surrogate pair"),
        ({"question": ""}, DataError, "question is empty"),
        ({"intro": None}, DataError, "intro is of type NoneType"),
        ({"stop": 3}, DataError, "stop is of type int"),
        ({"chat": True}, DataError, "no chat template"),
        ({"combine": "maps"}, RunError, "did you mean 'map'"),
        ({"chunk": 4000}, DataError, "more than the model's window of 256"),
        ({"chunk": 0}, RunError, "chunk=0"),
        ({"chunk": 50, "overlap": 50}, DataError, "smaller than the chunk"),
        ({"overlap": "x"}, RunError, "overlap='x'"),
        ({"max_new_tokens": 300}, DataError, "nothing is left for the document"),
        ({"batch_size": True}, RunError, "batch_size=True"),
    ],
)
def test_bad_input(
    demo: tuple[Any, Any], settings: Any, error: type[LongctxError], found: str
) -> None:
    given = {"document": "One. Two.", "question": "Which?", "max_new_tokens": 8} | settings
    document, asked = given.pop("document"), given.pop("question")
    with pytest.raises(error, match=found):
        longctx.read(*demo, document, asked, **given)


def test_a_summary_of_what_is_not_text_is_refused(demo: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="document is of type bytes"):
        longctx.summarise(*demo, b"One.")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="instruction is empty"):
        longctx.summarise(*demo, "One.", instruction=" ")


def test_the_command(tmp_path: Path, hidden: tuple[str, str], capsys: Any) -> None:
    file = tmp_path / "grass.txt"
    file.write_text(hidden[0])
    line = ["read", "demo", "--document", str(file), "--chunk", "180", "--max-new-tokens", "5"]
    ask = ["--question", "What is the pass key?", "--intro", CLASSIC.intro]
    assert main([*line, *ask, "--answer-prefix", "The pass key is ", "--overlap", "48"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == hidden[1]
    assert f"of {file}: {hidden[1]}" in said.err
    for wrong in ([], ["--question", "x", "--summarise"], ["--summarise", "--combine", "nbce"]):
        assert main([*line, *wrong]) == 2
    for place in (tmp_path, tmp_path / "none.txt"):
        assert main(["read", "demo", "--document", str(place), *ask]) == 2
    file.write_bytes(b"\xff\xfe\x00")
    assert main([*line, *ask]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("task", ["perplexity", "lines"])
def test_tasks_without_a_document_are_refused_before_any_work(
    demo: tuple[Any, Any], task: str
) -> None:
    with pytest.raises(RunError, match=f"read:map asks a document.*task {task}"):
        sweep(*demo, [task], [1024], methods=["read:map"], progress=False)


def test_a_sweep_reads_in_pieces(demo: tuple[Any, Any]) -> None:
    task = Passkey(samples=2, seed=1)
    found = sweep(*demo, [task], [512], methods=["read:map,chunk=180"], progress=False)
    (row,) = found.rows
    assert row.method == "read:map,chunk=180"
    assert [o.detail["key"] == o.detail["said"] for r in found.records for o in r.observations] == [
        o.correct for r in found.records for o in r.observations
    ]
