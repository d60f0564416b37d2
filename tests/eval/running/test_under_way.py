"""What is finished of a cell is kept: a run that is cut off loses the prompts that ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from longctx.errors import RunError
from longctx.eval import Passkey, Perplexity, Repetition, SweepResult, sweep
from longctx.eval.results import journal
from longctx.eval.results.store import Store
from longctx.eval.tasks import lines
from longctx.eval.tasks.lines import Lines
from longctx.eval.tasks.shared.protocol import Observation, UnderWay
from longctx.prompts.passkey_prompts import SHORT
from longctx.reading.read import Reading

LENGTHS = (300, 500)


class Cut(BaseException):
    """Stands for a signal."""


@pytest.fixture(autouse=True)
def every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_EVERY", 0.0)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each part has that is kept."""
    sizes: list[int] = []
    plain = UnderWay.add

    def add(self: UnderWay, observations: Sequence[Observation], tokens: int) -> None:
        plain(self, observations, tokens)
        sizes.append(len(observations))

    monkeypatch.setattr(UnderWay, "add", add)
    return sizes


def passkey(texts: tuple[str, ...], **fields: Any) -> Passkey:
    return Passkey(samples=8, depths=4, wording=SHORT, text=texts, **fields)


def facts(result: SweepResult) -> list[Any]:
    rows = [dataclasses.replace(row, seconds=0) for row in result.rows]
    records = [dataclasses.replace(record, seconds=0) for record in result.records]
    return [repr(rows), repr(records)]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("shared prefixes", "yarn:2"),
        ("whole prompts", "dynamic:2"),
        ("all lengths", "none"),
        ("generated", "none"),
        ("in pieces", Reading(combine="map", chunk=200)),
        ("continued", "none"),
    ],
)
def test_it_goes_on_at_the_prompt_where_it_was_cut_off(
    kind: str,
    method: Any,
    model: Any,
    tokenizer: Any,
    texts: tuple[str, ...],
    tmp_path: Path,
    added: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks: dict[str, Any] = {
        "all lengths": passkey(texts, share_lengths=True),
        "generated": Lines(samples=4, depths=2, free=True),
        "continued": Repetition(windows=4, new_tokens=4, text=texts),
    }
    task = tasks.get(kind, passkey(texts))
    lengths = (900,) if kind == "generated" else LENGTHS
    monkeypatch.setattr(lines, "_FREE", 6)

    def run(folder: str) -> SweepResult:
        return sweep(
            model, tokenizer, [task], lengths, methods=[method], batch_tokens=600,
            results=tmp_path / folder / "results.jsonl", progress=False,
        )  # fmt: skip

    whole = run("whole")
    parts, count = len(added), sum(added)
    assert parts > 3
    cut = parts - 2
    added.clear()

    def put(self: Store, record: Any) -> None:
        plain(self, record)
        if len(added) + 1 == cut:
            raise Cut

    plain = Store.put_part
    with monkeypatch.context() as patched:
        patched.setattr(Store, "put_part", put)
        with pytest.raises(Cut):
            run("cut")
    part = tmp_path / "cut" / "results.jsonl.part"
    assert part.exists()
    with part.open("ab") as file:
        file.write(b'{"key": "half a li')  # of the next part
    done = sum(added) + 1  # the one that the run was cut off at was kept too
    added.clear()
    resumed = run("cut")
    assert facts(resumed) == facts(whole)
    assert sum(added) <= count - done
    assert not part.exists()
    assert (part.parent / "results.jsonl").read_bytes().count(b"\n") == 1 + len(whole.records)


def test_parts_of_another_unit_stay_and_other_files_are_refused(
    model: Any, tokenizer: Any, texts: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    task = passkey(texts, haystack="grass")
    whole = sweep(model, tokenizer, [task], 300, results=path, progress=False)
    other = dataclasses.replace(whole.records[0], key="another")
    store = Store(path, whole.identity)
    store.put_part(other)
    store.put_part(dataclasses.replace(other, key=whole.records[0].key))
    store.flush()
    store.put(whole.records[0])
    store.close()
    assert [one.key for one in Store(path, whole.identity).parts("another")] == ["another"]
    part = tmp_path / "results.jsonl.part"
    part.write_text("my notes\n")
    with pytest.raises(RunError, match=r"part, line 1: .* It is not a results file"):
        Store(path, whole.identity)


def test_what_is_finished_is_told_by_task_and_prompt(
    model: Any,
    tokenizer: Any,
    texts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from longctx.eval.running.progress import Progress

    said: list[str] = []
    done: list[float] = []
    monkeypatch.setattr(Progress, "at", lambda self, what: said.append(what))  # pyright: ignore
    monkeypatch.setattr(Progress, "advance", lambda self, amount: done.append(amount))  # pyright: ignore
    task, path = passkey(texts), tmp_path / "results.jsonl"
    sweep(model, tokenizer, [task], 500, results=path, batch_tokens=600, progress=False)
    assert said[:2] == ["prompts of passkey", "none passkey 500: 0 of 8 prompts"]
    assert "none passkey 500: 5 of 8 prompts" in said
    assert said[-1] == "none passkey 500: 8 of 8 prompts"
    assert sum(done[1:]) == pytest.approx(500 * 8 * (1 + 500 / 8192))  # after the prompts
    done.clear()
    sweep(model, tokenizer, [task], 500, results=path, batch_tokens=600, progress=False)
    assert sum(done[1:]) == 0, "what was there before is no work"


def test_too_few_prompts_for_the_depths_are_told(
    model: Any, tokenizer: Any, texts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    task = Passkey(samples=4, wording=SHORT, text=texts)
    result = sweep(model, tokenizer, [task], 300)
    note = (
        "passkey: 4 prompts a length are too few for 10 depths and 2 kinds of haystack: they stand "
        "at 25%, 75%. Pass samples=20 or more, or depths=2"
    )
    assert note in result.notes
    assert f"note: {note}" in capsys.readouterr().err
    for enough in (Passkey(samples=4, depths=2), Passkey(samples=3, depths=None), Passkey()):
        assert not enough.plan_notes()
    assert "too few for 10 depths: they stand at 50%" in Lines(samples=1).plan_notes()[0]


def test_that_dynamic_has_no_longest_request_is_told(
    model: Any, tokenizer: Any, texts: tuple[str, ...]
) -> None:
    task = Perplexity(last=64, windows=1, text=texts)
    result = sweep(model, tokenizer, [task], 300, methods=["dynamic:1"], progress=False)
    said = next(note for note in result.notes if note.startswith("dynamic:1: "))
    assert "leaves the config's window at 512 tokens" in said
    assert "(1,024 tokens as by ntk:2)" in said
