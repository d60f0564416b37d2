"""Sweeps over compressed caches: one grid with the full one, which stays as it was."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from longctx.errors import LongctxError, RunError
from longctx.eval import (
    Passkey,
    Perplexity,
    Questions,
    Repetition,
    Ruler,
    compare,
    print_sweep,
    sweep,
    write_sweep,
)
from longctx.eval.reporting.html import write_html
from longctx.eval.reporting.leaderboard import write_leaderboard
from longctx.eval.results.reader import read_sweep
from longctx.prompts.passkey_prompts import SHORT
from longctx.scoring.compressed_caches import Press, Quantized, Sliding
from longctx.scoring.over_cache import CacheReader, score_over_cache

from ...core.scoring.test_over_cache import EverySecond
from ..conftest import byte_model, byte_tokenizer

LENGTHS = (260, 400)
TASK = Passkey(samples=3, haystack="grass", wording=SHORT)
TEXT = (__file__,)
FP8 = "quantized:8,backend=fp8"


def run(tasks: Any = TASK, lengths: Any = LENGTHS, **settings: Any) -> Any:
    return sweep(byte_model(), byte_tokenizer(), tasks, lengths, progress=False, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of two methods and three caches over both kinds of task."""
    home = tmp_path_factory.mktemp("caches")
    texts = home / "texts"
    texts.mkdir()
    for name in "abc":
        (texts / f"{name}.txt").write_text(f"Line of {name}, one more.\n" * 60)
    tasks = [TASK, Perplexity(last=8, windows=3, text=(str(texts),))]
    found = run(
        tasks,
        methods=["none", "yarn:2"],
        caches=["full", "sliding:64", FP8],
        results=home / "run" / "results.jsonl",
    )
    write_sweep(found, home / "run")
    return home / "run"


def test_the_full_cache_is_as_it_was_bit_for_bit(tmp_path: Path) -> None:
    alone = run(methods=["none", "yarn:2"], results=tmp_path / "alone.jsonl")
    grid = run(
        methods=["none", "yarn:2"], caches=["sliding:64", "full"], results=tmp_path / "grid.jsonl"
    )
    labels = ["none · sliding:64", "none", "yarn:2 · sliding:64", "yarn:2"]
    assert [variant.label for variant in grid.variants] == labels
    for row in alone.rows:
        same = grid.row(row.method, row.task, row.length)
        assert row.cache_bytes is None
        assert dataclasses.replace(same, seconds=row.seconds, cache_bytes=None) == row
        assert same.cache_bytes == (row.length - 1) * 2 * 16 * 4
    keys = {record.key for record in alone.records}
    assert keys < {record.key for record in grid.records}
    assert '"cache_bytes"' not in (tmp_path / "alone.jsonl").read_text()
    assert "cache_bytes" not in alone.frame().columns
    assert not any("cache" in note for note in alone.notes)
    again = run(methods=["none", "yarn:2"], caches="full", results=tmp_path / "grid.jsonl")
    assert again.rows == tuple(
        dataclasses.replace(row, cache_bytes=None) for row in grid.rows if "·" not in row.method
    )


def test_each_prompt_is_scored_as_by_itself() -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    kinds = [Sliding(64), Quantized(bits=8, backend="fp8"), Press(EverySecond())]
    found = run(caches=[*kinds[:2], EverySecond()])
    for length in LENGTHS:
        unit = TASK.part(length, range(TASK.samples), length)
        prompts = [prompt for _, _, prompt in TASK.cases(tokenizer, unit)]
        for kind in kinds:
            (record,) = (
                r for r in found.records if str(kind) in r.method and r.lengths == (length,)
            )
            assert record.how == f"contexts in {kind}"
            assert record.tokens == TASK.samples * (length - 1)
            for prompt, one in zip(prompts, record.observations, strict=True):
                assert prompt.document is not None
                places = {"context_end": prompt.document[1], "start": prompt.answer_start}
                alone = score_over_cache(model, prompt.input_ids, kind, **places)
                assert one.nll == pytest.approx(float(alone.nll.double().sum()), abs=1e-6)
                assert one.detail["argmax_ids"] == alone.argmax.tolist()
                reader = CacheReader(model, prompt.input_ids[: prompt.document[1]], kind)
                logits = reader.read(prompt.input_ids[prompt.document[1] : prompt.answer_start])
                assert one.detail["argmax_ids"][0] == int(logits.argmax())


def test_perplexity_is_over_the_last_tokens_alone(folder: Path) -> None:
    found = read_sweep(folder)
    for method in found.methods:
        rows = found.cells("perplexity", method)
        assert [row.n for row in rows] == [3, 3]
        assert all(math.isfinite(row.value) for row in rows)
        assert (rows[0].prefix is None) == ("·" in method)
    full, sliding = (
        found.observations("perplexity", name, 400) for name in ("none", "none · sliding:64")
    )
    assert [o.item for o in full] == [o.item for o in sliding]
    assert all(o.targets == 8 for o in sliding)
    wide = run(
        Perplexity(last=8, windows=1, text=TEXT),
        260,
        caches=["full", "sliding:300"],
        methods="yarn:2",
    )
    assert wide.rows[0].nll == pytest.approx(wide.rows[1].nll, abs=1e-5)
    with pytest.raises(LongctxError, match="leaves no context before last=259 targets"):
        run(Perplexity(last=259, windows=1, text=TEXT), 260, caches="sliding:64")


def test_answers_are_generated_over_the_cache(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    lines = [
        {"context": "Tea is hot. " * 9, "question": f"Which? {i}", "answers": ["tea"]}
        for i in range(2)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    asked = Questions(file=str(file), new_tokens=9)
    found = run(
        [asked, Ruler(only=("niah_single_1",), samples=1)],
        1500,
        caches=["full", "sliding:2000", "sliding:8"],
    )
    for task in ("questions", "ruler"):
        full, wide, narrow = (
            [
                o.detail["said_ids"]
                for r in found.records
                if (r.task, r.method) == (task, name)
                for o in r.observations
            ]
            for name in ("none", "none · sliding:2000", "none · sliding:8")
        )
        assert full == wide != narrow
    tokenizer = byte_tokenizer()
    unit = asked.plan(tokenizer, (1500,), length_invariant=False).units[0]
    for i, (_, one) in enumerate(asked.questions(tokenizer, unit)):
        after = str(tokenizer.decode(list(one.input_ids[one.context_end :])))
        assert after == f"\n\nQuestion: Which? {i} Answer:"


def test_bytes_are_those_of_the_longest_prompt(folder: Path) -> None:
    found = read_sweep(folder)
    sizes = {row.method: row.cache_bytes for row in found.rows if row.length == 400}
    token = 2 * 16  # numbers
    assert sizes == {
        "none": 399 * token * 4,
        "none · sliding:64": 63 * token * 4,
        f"none · {FP8}": 399 * token + 2 * 4,
        "yarn:2": 399 * token * 4,
        "yarn:2 · sliding:64": 63 * token * 4,
        f"yarn:2 · {FP8}": 399 * token + 2 * 4,
    }


def test_tables_pages_and_comparisons_take_such_rows(folder: Path, tmp_path: Path) -> None:
    report = json.loads((folder / "sweep.json").read_text())
    assert report["methods"][1]["method"] == {
        "cache": {"name": "sliding", "window": 64},
        "method": None,
    }
    assert any("prefilled without the question" in note for note in report["notes"])
    page = write_html([folder], tmp_path / "page.html")[0].read_text()
    assert "yarn:2 · sliding:64" in page
    assert "yarn:2 · sliding:64" in write_leaderboard([folder], tmp_path / "all.html").read_text()
    typed = {"full": f"{folder}#none", "other": f"{folder}#none·sliding:window=64"}
    found = compare(typed)
    assert found.row("passkey", 400, "other").paired == TASK.samples
    assert not found.missing


def test_the_table_has_a_column_of_bytes() -> None:
    found = run(lengths=300, caches=["full", FP8])
    console = Console(file=io.StringIO(), width=120)
    print_sweep(found, console)
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "cache MiB" in shown
    assert f"{299 * 32 * 4 / 2**20:.3g}" in shown
    assert "held for one prompt of 300 tokens, at its end" in shown


def test_a_cut_off_grid_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    caches = ["full", "sliding:64"]
    whole = run(caches=caches, results=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    resumed = run(caches=caches, results=path)
    for one, other in zip(whole.rows, resumed.rows, strict=True):
        assert dataclasses.replace(one, seconds=0) == dataclasses.replace(other, seconds=0)
    assert len(resumed.records) == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"caches": ["full", "full"]}, "cache 'full' is asked for twice"),
        ({"caches": "sliding:64", "methods": "read:map"}, "makes caches of its own"),
        ({"caches": FP8, "methods": "dynamic:2"}, "follow the length of the request"),
        ({"caches": FP8, "methods": "sink_window:window=64"}, "a bounded cache of its own"),
        ({"caches": "sliding:64", "methods": "dual_chunk:2"}, "counts distances by places"),
        ({"caches": [EverySecond()], "methods": "alibi"}, "counts distances by places"),
        (
            {"caches": "sliding:64", "tasks": "lines:samples=3,depths=3", "lengths": 1100},
            "do not say what is context",
        ),
        (
            {"caches": FP8, "tasks": Repetition(text=TEXT, windows=1)},
            "task repetition cannot be read over a",
        ),
        (
            {"caches": FP8, "tasks": Perplexity(last=8, stride=4, text=TEXT)},
            "stride=None, a number as last",
        ),
        ({"caches": [3]}, "3 is not a press"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    given = {"lengths": 600, **settings}
    with pytest.raises(RunError) as error:
        run(given.pop("tasks", TASK), **given)
    assert said in str(error.value)


def test_methods_that_keep_every_key_go_with_fewer_bits() -> None:
    found = run(lengths=600, methods=["dual_chunk:2", "log_n"], caches=["full", FP8])
    for method in ("dual_chunk:2", "log_n"):
        full, fp8 = (found.row(name, "passkey", 600) for name in (method, f"{method} · {FP8}"))
        assert fp8.nll == pytest.approx(full.nll, rel=0.05)
        assert fp8.nll != full.nll


def test_verified_answers_are_those_of_the_full_cache() -> None:
    found = run(lengths=260, caches=["full", "sliding:64"], verify=2)
    assert [(check.method, check.checked) for check in found.verified] == [("none", 2)]
    assert any("none was verified" in note for note in found.notes)
    assert torch.is_grad_enabled()
