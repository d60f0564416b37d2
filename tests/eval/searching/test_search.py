"""The search for divisors: legal candidates, one course per seed, resumable, on other prompts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import longctx
from longctx.cli.main import main
from longctx.cli.search import Search
from longctx.errors import MethodError, RunError
from longctx.eval import SearchSettings, search, write_found
from longctx.eval.searching.evolution import Divisors, Evolution, known_divisors
from longctx.eval.searching.objective import KeyLoss, key_prompts
from longctx.fingerprint import model_digest
from longctx.prompts.haystacks import Texts
from longctx.prompts.passkey_prompts import split_of
from longctx.rope import Rope

ROPE = Rope(dim=16, theta=10_000.0, length=256)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> SearchSettings:
    """A search of seven candidates on a short text."""
    text = tmp_path_factory.mktemp("text") / "lines.txt"
    text.write_text("".join(f"Line {i} of a text.\n" for i in range(999)))
    return SearchSettings(
        evaluations=7, population=6, prompts=2, near_prompts=2, finalists=1, text=(str(text),)
    )


def test_the_first_candidates_are_what_other_methods_come_to() -> None:
    known = known_divisors(ROPE, 4.0)
    assert known["none"] == Divisors((1.0,) * 8, 1.0)
    assert known["linear"].values == pytest.approx((4.0,) * 8)
    assert known["ntk"].values[0] == pytest.approx(1.0)
    assert known["ntk"].values[-1] == pytest.approx(4.0)  # NTK's own definition
    assert known["yarn"].attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_candidates_are_legal_new_and_follow_from_the_seed() -> None:
    def course(seed: int) -> list[Divisors]:
        evolution = Evolution(known_divisors(ROPE, 4.0), 4.0, population=8, seed=seed)
        found: list[Divisors] = []
        for candidate in itertools.islice(evolution.candidates(), 60):
            evolution.tell(candidate, sum(candidate.values))
            found.append(candidate)
        return found

    one = course(0)
    assert one == course(0) != course(1)
    assert len(set(one)) == 60
    for candidate in one:
        assert all(1 <= value <= 8 for value in candidate.values)
        assert list(candidate.values) == sorted(candidate.values)
        assert 0.5 <= candidate.attention_factor <= 2.0


def test_an_evolution_goes_where_the_loss_is_low() -> None:
    wanted = torch.linspace(1, 4, 8).tolist()

    def loss(candidate: Divisors) -> float:
        pairs = zip(candidate.values, wanted, strict=True)
        return sum(math.log(a / b) ** 2 for a, b in pairs)

    evolution = Evolution(known_divisors(ROPE, 4.0), 4.0, population=20, seed=0)
    for candidate in itertools.islice(evolution.candidates(), 400):
        evolution.tell(candidate, loss(candidate))
    first = min(loss(candidate) for candidate in known_divisors(ROPE, 4.0).values())
    assert loss(evolution.best(1)[0]) < 0.1 * first


def test_nan_is_the_worst() -> None:
    evolution = Evolution(known_divisors(ROPE, 4.0), 4.0, population=8, seed=0)
    some = list(itertools.islice(evolution.candidates(), 3))
    for candidate, loss in zip(some, (math.nan, 2.0, 1.0), strict=True):
        evolution.tell(candidate, loss)
    assert evolution.best(3) == [some[2], some[1], some[0]]


def test_prompts_are_of_the_training_split(tokenizer: Any) -> None:
    text = Texts(tuple(f"Line {i} of a text.\n" * 99 for i in range(9)), name="lines")
    prompts = key_prompts(tokenizer, 1024, 14, text=text, seed=0)
    assert {split_of(prompt.key) for prompt in prompts} == {"train"}
    assert {len(prompt.input_ids) for prompt in prompts} == {1024}
    stretches = [p.haystack for p in prompts if p.haystack != "grass"]
    assert len(set(stretches)) == len(stretches) == 10  # each of its own: none is learnt by heart
    depths = sorted(prompt.depth for prompt in prompts)
    assert depths[0] < 0.15
    assert depths[-1] > 0.85
    assert all(0 < after - before < 0.15 for before, after in itertools.pairwise(depths))
    others = key_prompts(tokenizer, 1024, 14, text=text, seed=1)
    assert not {p.input_ids for p in prompts} & {p.input_ids for p in others}


def test_a_search_leaves_no_trace_and_its_method_is_read_from_the_file(
    model: Any,
    tokenizer: Any,
    quick: SearchSettings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = model_digest(model)
    found = search(model, tokenizer, 1024, settings=quick, folder=tmp_path, progress=False)
    assert "Unrecognized keys" not in caplog.text  # else a line for each candidate
    assert model_digest(model) == before
    assert found.evaluations == 7
    assert found.loss <= min(found.known_losses.values())
    path = write_found(found, tmp_path / "longrope.json")
    assert longctx.parse_method(f"longrope:@{path}") == found.method
    assert write_found(dataclasses.replace(found, seconds=9.0), path) == path
    assert json.loads(path.read_text())["search"]["seconds"] != 9.0
    for fields in ({**found.fields, "factor": 3.0}, {}):
        with pytest.raises(RunError, match="is there"):
            write_found(dataclasses.replace(found, fields=fields), path)
    with longctx.extend(model, f"longrope:@{path}") as patch:
        assert patch.report().window == 1024


def test_an_interrupted_search_goes_on(
    model: Any, tokenizer: Any, quick: SearchSettings, tmp_path: Path
) -> None:
    whole = search(model, tokenizer, 1024, settings=quick, folder=tmp_path / "a", progress=False)
    path = tmp_path / "a" / "evaluations.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "b" / "evaluations.jsonl"
    cut.parent.mkdir()
    cut.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    again = search(model, tokenizer, 1024, settings=quick, folder=cut.parent, progress=False)
    assert (again.method, again.loss) == (whole.method, whole.loss)
    assert cut.read_bytes() == path.read_bytes()


def test_divisors_that_give_nan_are_never_found(
    model: Any, tokenizer: Any, quick: SearchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where NaN is met first, nor where there is nothing else."""
    losses = iter([2.0, 1.0, 3.0, 4.0, 5.0, 6.0, 7.0, math.nan, 2.5, 3.5, 4.5])
    monkeypatch.setattr(KeyLoss, "__call__", lambda *_: next(losses))
    found = search(model, tokenizer, 1024, settings=quick, progress=False)
    assert math.isfinite(found.loss)
    assert found.known_losses["linear"] == math.inf  # the finalist, whose fresh loss was NaN
    monkeypatch.setattr(KeyLoss, "__call__", lambda *_: math.nan)
    with pytest.raises(RunError, match="NaN or infinite under all divisors"):
        search(model, tokenizer, 1024, settings=quick, progress=False)


def test_what_cannot_be_searched_is_refused(
    model: Any, tokenizer: Any, quick: SearchSettings, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="more tokens than the model's window, 512"):
        search(model, tokenizer, 512)
    with longctx.extend(model, "yarn:2"), pytest.raises(MethodError, match="as it came"):
        search(model, tokenizer, 1024)
    with pytest.raises(RunError, match="population=2: expected a whole number, 6 or more"):
        SearchSettings(population=2)
    search(model, tokenizer, 1024, settings=quick, folder=tmp_path, progress=False)
    other = dataclasses.replace(quick, prompts=3)
    with pytest.raises(RunError, match="is of a search with prompts=2, this one has 3"):
        search(model, tokenizer, 1024, settings=other, folder=tmp_path, progress=False)
    text = Path(quick.text[0])
    before = text.read_text()
    text.write_text(before.replace("Line", "Row"))
    with pytest.raises(RunError, match="is of a search with text="):
        search(model, tokenizer, 1024, settings=quick, folder=tmp_path, progress=False)
    text.write_text(before)
    (tmp_path / "evaluations.jsonl").write_text("a diary\n")
    with pytest.raises(RunError, match="not a file of evaluations"):
        search(model, tokenizer, 1024, settings=quick, folder=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there"),
        ("[", "is not JSON"),
        ("[1]", "does not hold"),
        ('{"method": "yarn", "fields": {}}', "does not hold"),
        ('{"method": "longrope", "fields": {"speed": 1}}', "has no field 'speed'"),
        ('{"method": "longrope", "fields": {"factor": 2, "divisors": "x"}}', "list of numbers"),
    ],
)
def test_a_file_of_fields_that_cannot_be_used(
    content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "fields.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MethodError, match=message):
        longctx.parse_method(f"longrope:@{path}")


def test_what_was_found_is_there_before_the_report(
    model: Any,
    tokenizer: Any,
    quick: SearchSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = search(model, tokenizer, 1024, settings=quick, folder=tmp_path, progress=False)
    monkeypatch.setattr("longctx.eval.searching.search.search", lambda *_, **__: found)
    command = ["search", "demo", "--target", "1k", "--out", str(tmp_path)]
    for written in (False, True):  # a kill during the report, and another one when it goes on
        assert (tmp_path / "longrope.json").exists() == written
        with monkeypatch.context() as changed:
            changed.setattr(Search, "_report", _interrupt)
            assert main(command) == 130
    monkeypatch.setattr(Search, "_report", lambda *_: 0)
    (tmp_path / "sweep.svg").touch()
    assert main(command) == 2
    assert "longrope.json is there" in capsys.readouterr().err
    (tmp_path / "evaluations.jsonl").unlink()
    (tmp_path / "sweep.svg").unlink()
    assert main(command) == 2  # of another search: refused before anything is done


def _interrupt(*_: object) -> int:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_the_command_searches_reports_and_says_how_to_use_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--evaluations", "6", "--population", "6", "--prompts", "2", "--near-prompts", "0"]
    out = tmp_path / "search"
    command = ["search", "demo", "--target", "512", "--report-samples", "2", "--out", str(out)]
    assert main([*command, *quick]) == 0
    said = capsys.readouterr().out
    assert "The result: no better than" in said or "The result: new" in said
    assert f"longrope:@{out / 'longrope.json'}" in said
    assert "note: yarn says nearly all keys of these prompts" in said  # at twice the window
    assert json.loads((out / "longrope.json").read_text())["search"]["evaluations"] == 6
    assert main([*command, *quick]) == 2
    assert "--overwrite" in capsys.readouterr().err
