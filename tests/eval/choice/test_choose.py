"""Choosing by measurement: screening, comparison on other prompts, and one recommendation."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

import longctx
from longctx.cli.main import main
from longctx.errors import RunError
from longctx.eval import ChoiceSettings, choose, print_choice, write_choice
from longctx.eval.choice.candidates import default_candidates
from longctx.eval.choice.choose import Finalist, recommend
from longctx.eval.comparison.differences import Difference
from longctx.eval.results.sweep_result import SweepResult
from longctx.eval.running.sweep import sweep
from longctx.fingerprint import model_digest

QUICK = ChoiceSettings(
    first_samples=2,
    screening_samples=2,
    samples=2,
    finalists=2,
    windows=2,
    task="passkey:haystack=grass",
)


def difference(value: float, p: float) -> Difference:
    return Difference(value, math.nan, math.nan, "none", p, "", 1, 1)


def finalist(label: str, found: int, **changes: Any) -> Finalist:
    gain = None if label == "none" else difference(0.5, 0.001)
    one = Finalist(label, found, 80, 0.0, 1.0, None, gain, None, 1.0, plain=False, in_pieces=False)
    return dataclasses.replace(one, **changes)


def test_candidates_are_written_as_the_command_line_reads_them() -> None:
    for text in (*default_candidates(256, 1024), *default_candidates(8192, 12_288)):
        if not text.startswith("read:"):
            assert longctx.parse_methods(text)
    assert "yarn:2+dual_chunk:factor=2.0,log_n=True" in default_candidates(256, 1024)


def test_what_plain_transformers_loads_is_preferred_among_equals() -> None:
    same, worse = difference(-0.01, 0.6), difference(-0.3, 0.001)
    pieces = finalist("read:map", 80, in_pieces=True)
    remapped = finalist("dual_chunk:4", 79, behind=same)
    yarn = finalist("yarn:4", 78, behind=same, plain=True)
    none = finalist("none", 20, behind=worse, plain=True)
    assert recommend([pieces, remapped, yarn, none])[0] == "yarn:4"
    lost = dataclasses.replace(yarn, behind=worse)
    assert recommend([pieces, remapped, lost, none])[0] == "dual_chunk:4"
    costly = dataclasses.replace(remapped, perplexity=difference(0.2, 0.001))
    other = finalist("rerope:4", 75, behind=same, perplexity=difference(0.1, 0.4))
    method, reason = recommend([pieces, costly, other, none])
    assert method == "rerope:4"
    assert "no cost in perplexity was shown" in reason


def test_nothing_is_recommended_that_does_not_read_further() -> None:
    none = finalist("none", 20, behind=difference(-0.02, 0.5), plain=True)
    yarn = finalist("yarn:4", 22, plain=True, gain=difference(0.02, 0.5))
    method, reason = recommend([yarn, none])
    assert method == "none"
    assert "train it" in reason


def test_one_that_is_not_told_from_the_best_has_to_read_further_too() -> None:
    best = finalist("dual_chunk:4", 30)
    between = finalist("yarn:4", 24, plain=True, behind=difference(-0.08, 0.06))
    none = finalist("none", 20, behind=difference(-0.12, 0.001), plain=True)
    assert recommend([best, between, none])[0] == "yarn:4"
    unsure = dataclasses.replace(between, gain=difference(0.05, 0.2))
    method, reason = recommend([best, unsure, none])
    assert method == "dual_chunk:4"
    assert "not told apart from it: yarn:4" in reason
    worse = dataclasses.replace(between, found=0, gain=difference(-0.25, 0.001))
    assert recommend([best, worse, none])[0] == "dual_chunk:4"


def test_a_choice_is_measured_printed_and_written(
    model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = model_digest(model)
    candidates = ["yarn:2", "linear:2", "yarn:2+log_n", "alibi:slopes=x"]

    def chosen() -> Any:
        return choose(
            model, tokenizer, 1024, candidates=candidates, settings=QUICK, folder=tmp_path,
            progress=False,
        )  # fmt: skip

    choice = chosen()
    assert model_digest(model) == before
    assert "alibi:slopes=x" in choice.dropped
    assert {one.label for one in choice.finalists} >= {"none"}
    assert len(choice.finalists) == 3
    assert choice.recommended == "none"  # a random model finds nothing under any of them
    print_choice(choice)
    assert "so few prompts cannot show it" in " ".join(capsys.readouterr().out.split())
    write_choice(choice, tmp_path)
    written = json.loads((tmp_path / "choice.json").read_text())
    assert written["recommended"] == "none"
    files = {p: p.read_bytes() for p in tmp_path.rglob("results.jsonl")}
    assert len(files) == 4
    assert [dataclasses.replace(one, seconds=0) for one in chosen().finalists] == [
        dataclasses.replace(one, seconds=0) for one in choice.finalists
    ]
    assert {p: p.read_bytes() for p in files} == files  # nothing was asked twice


def test_the_best_of_several_has_to_beat_the_model_by_more() -> None:
    """The best is picked by the prompts that it is then compared on."""
    close = finalist("none", 20, behind=difference(-0.1, 0.02), plain=True)
    best = finalist("yarn:4", 28, plain=True, gain=difference(0.1, 0.02))
    others = [finalist(f"ntk:{n}", 21, behind=difference(-0.09, 0.03)) for n in (2, 4, 8)]
    assert recommend([best, close])[0] == "yarn:4"
    assert recommend([best, *others, close])[0] == "none"


@pytest.mark.parametrize("stage", ["first", "screening", "keys", "inside"])
def test_a_candidate_that_fails_at_a_length_is_dropped_not_judged_by_the_others(
    stage: str, model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = "out of memory at 1024 tokens, one prompt at a time"

    def failing(*given: Any, results: Path, **settings: Any) -> SweepResult:
        """What yarn answers at the shorter length is right, and it fails at the longer one."""
        result = sweep(*given, results=results, **settings)
        if results.parent.name != stage:
            return result
        longest = max(result.lengths)
        records = [
            dataclasses.replace(
                record,
                observations=()
                if longest in record.lengths
                else tuple(dataclasses.replace(o, correct=True) for o in record.observations),
                failed=lost if longest in record.lengths else None,
            )
            if record.method == "yarn:2"
            else record
            for record in result.records
        ]
        rows = [
            dataclasses.replace(row, failed=lost)
            if (row.method, row.length) == ("yarn:2", longest)
            else row
            for row in result.rows
        ]
        return dataclasses.replace(result, records=tuple(records), rows=tuple(rows))

    monkeypatch.setattr("longctx.eval.choice.choose.sweep", failing)
    choice = choose(
        model, tokenizer, 1024, candidates=["yarn:2", "linear:2"], settings=QUICK,
        folder=tmp_path, progress=False,
    )  # fmt: skip
    assert lost in choice.dropped["yarn:2"]
    assert {one.label for one in choice.finalists} == {"none", "linear:2"}
    if stage == "first":
        with pytest.raises(RunError, match="no candidate could be measured"):
            choose(
                model, tokenizer, 1024, candidates=["yarn:2"], settings=QUICK,
                folder=tmp_path, progress=False,
            )  # fmt: skip


def test_what_cannot_be_chosen_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(RunError, match="more tokens than the model's window, 512"):
        choose(model, tokenizer, 512)
    with longctx.extend(model, "yarn:2"), pytest.raises(RunError, match="as it came"):
        choose(model, tokenizer, 1024)
    with pytest.raises(RunError, match="no candidate can be put on this model"):
        choose(model, tokenizer, 1024, candidates=["none"])
    with pytest.raises(RunError, match=r"candidate 'yarn:2' is named twice"):
        choose(model, tokenizer, 1024, candidates=["yarn:2", "yarn:2"])
    with pytest.raises(RunError, match="draws prompts with one right answer"):
        choose(
            model,
            tokenizer,
            1024,
            candidates=["yarn:2"],
            settings=ChoiceSettings(task="perplexity"),
        )
    with pytest.raises(RunError, match="samples=1: expected"):
        ChoiceSettings(samples=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "1k,2k"], "expected one length"),
        (["--target", "1k", "--candidates", "warp:4"], "unknown method 'warp'"),
        (["--target", "1k", "--tokens", "many"], "expected a number such as 500k or 20M"),
    ],
)
def test_a_command_line_that_cannot_be(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["auto", "demo", "--out", str(tmp_path / "auto"), *options]) == 2
    assert message in capsys.readouterr().err


def test_training_is_of_as_many_tokens_as_were_asked_for() -> None:
    from longctx.cli.auto import Auto

    said = Auto("demo", "256k", tokens="20M")._training(262_144, 20_000_000)  # pyright: ignore[reportPrivateUsage]
    assert "--max-steps 76 --batch-size 1 " in said
    assert "--method linear:target=262144 " in said


def test_the_command_for_reading_has_all_that_was_measured() -> None:
    from longctx.cli.auto import Auto

    said = Auto("demo", "1k")._command("read:map,chunk=100,overlap=20")  # pyright: ignore[reportPrivateUsage]
    assert "--combine map --chunk 100 --overlap 20 --batch-size 8" in said
