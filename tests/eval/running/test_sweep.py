"""Sweeps: every cell once, on the same inputs, resumed, and honest about what failed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import longctx
from longctx.errors import DataError, MethodError, ModelError, RunError
from longctx.eval import Measured, Observation, Perplexity, Plan, Summary, Task, Unit, sweep
from longctx.fingerprint import model_digest

from ..conftest import WINDOW, byte_model, byte_tokenizer

LENGTHS = (300, 600, 1200)
METHODS = ("none", "yarn:2", "dynamic:2")


@dataclass(frozen=True, slots=True)
class Count:
    """A task that runs no model: what it is asked for is written down in `calls`."""

    calls: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]], compare=False)
    memory: int = 10_000
    nll: float = 1.0

    name: ClassVar[str] = "count"
    scale: ClassVar[Literal["share", "perplexity"]] = "share"
    higher_is_better: ClassVar[bool] = True
    figure: ClassVar[str | None] = None

    @property
    def estimand(self) -> str:
        return "nothing"

    def report_identity(self) -> dict[str, Any]:
        return self.cache_key()

    def cache_key(self) -> dict[str, Any]:
        return {"memory": self.memory}

    def plan(self, tokenizer: Any, lengths: Sequence[int], *, length_invariant: bool) -> Plan:
        whole = Unit(tuple(lengths), max(lengths))
        return Plan((whole,) if length_invariant else tuple(whole.by_length()), ("a note",))

    def measure(
        self, model: Any, tokenizer: Any, unit: Unit, *, batch_tokens: int, length_invariant: bool
    ) -> Measured:
        self.calls.append(unit.lengths)
        if max(unit.lengths) > self.memory:
            raise torch.OutOfMemoryError("out of memory")
        found = (Observation(n, "0", "c", self.nll * n, n, correct=True) for n in unit.lengths)
        return Measured(tuple(found), unit.tokens, "not at all")

    def summarise(self, observations: Sequence[Observation]) -> Summary:
        return Summary(float(len(observations)), 0.0, 2.0, "made up")


def test_every_cell_is_there_in_order(model: Any, tokenizer: Any, texts: tuple[str, ...]) -> None:
    before = model_digest(model)
    task = Perplexity(last=64, windows=3, text=texts)
    result = sweep(model, tokenizer, [task, Count()], LENGTHS, methods=METHODS, progress=False)
    assert [(row.method, row.task, row.length) for row in result.rows] == [
        (method, name, length)
        for method in METHODS
        for name in ("perplexity", "count")
        for length in LENGTHS
    ]
    assert model_digest(model) == before
    assert longctx.patch_of(model) is None
    assert result.original_window == WINDOW
    assert {r.length for r in result.rows if r.method == "none" and r.beyond_window} == {600, 1200}
    assert {r.length for r in result.rows if r.method == "yarn:2" and r.beyond_window} == {1200}
    assert all(row.failed is None and row.n > 0 for row in result.rows)
    assert isinstance(task, Task)


def test_a_cell_is_what_the_task_alone_gives(
    model: Any, tokenizer: Any, texts: tuple[str, ...]
) -> None:
    task = Perplexity(last=64, windows=2, text=texts)
    result = sweep(model, tokenizer, [task], LENGTHS, methods=METHODS, progress=False)
    for method in METHODS:
        patch = None if method == "none" else longctx.extend(model, method)
        for length in LENGTHS:
            # One length at a time, in windows where those of the longest begin.
            units = task.plan(tokenizer, (length, max(LENGTHS)), length_invariant=False).units
            found = [
                observation
                for unit in units
                if unit.lengths == (length,)
                for observation in task.measure(
                    model, tokenizer, unit, batch_tokens=1, length_invariant=False
                ).observations
            ]
            wanted = math.exp(sum(o.nll for o in found) / sum(o.targets for o in found))
            assert result.row(method, "perplexity", length).value == pytest.approx(wanted, 1e-5)
        if patch:
            patch.remove()


def test_one_pass_where_it_is_exact_and_its_cost_is_shared(model: Any, tokenizer: Any) -> None:
    task = Count()
    result = sweep(model, tokenizer, [task], LENGTHS, methods=METHODS, progress=False)
    assert task.calls == [LENGTHS, LENGTHS, (300,), (600,), (1200,)]
    costs = {m: [result.row(m, "count", n).tokens for n in LENGTHS] for m in METHODS}
    assert costs["none"] == costs["yarn:2"] == [300, 300, 600]
    assert costs["dynamic:2"] == [300, 600, 1200]


def test_a_rerun_measures_nothing_and_gives_the_same(
    model: Any, tokenizer: Any, texts: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    task, count = Perplexity(last=64, windows=2, text=texts), Count()

    def run(*methods: str) -> Any:
        return sweep(
            model, tokenizer, [task, count], LENGTHS, methods=methods, results=path, progress=False
        )

    first = run("none", "yarn:2")
    size, calls = path.stat().st_size, len(count.calls)
    assert repr(run("none", "yarn:2").rows) == repr(first.rows)  # NaN is not equal to itself
    assert (path.stat().st_size, len(count.calls)) == (size, calls)
    grown = run("none", "yarn:2", "linear:2")
    assert repr(grown.rows[: len(first.rows)]) == repr(first.rows)
    assert len(count.calls) == calls + 1


def test_a_run_that_was_cut_off_goes_on_to_the_same_result(
    model: Any, tokenizer: Any, texts: tuple[str, ...], tmp_path: Path
) -> None:
    task = Perplexity(last=64, windows=3, text=texts)

    def run(path: Path) -> Any:
        return sweep(
            model, tokenizer, [task], LENGTHS, methods=METHODS, results=path, progress=False
        )

    whole = run(tmp_path / "whole.jsonl")
    data = (tmp_path / "whole.jsonl").read_bytes()
    for cut in (50, len(data) // 3, len(data) // 2, len(data) - 1):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(data[:cut])
        resumed = run(path)
        assert "the last line was cut off" in resumed.notes[0]
        for one, other in zip(whole.rows, resumed.rows, strict=True):
            one, other = (dataclasses.replace(row, seconds=0) for row in (one, other))
            assert repr(one) == repr(other)  # NaN is not equal to itself


def test_results_of_another_model_are_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    sweep(model, tokenizer, [Count()], LENGTHS, results=path, progress=False)
    with pytest.raises(RunError, match="holds the results of another model"):
        sweep(byte_model(1), tokenizer, [Count()], LENGTHS, results=path, progress=False)
    by_hand: Any = byte_model()
    by_hand.model.rotary_emb.inv_freq.div_(4)
    with pytest.raises(RunError, match="holds the results of another model"):
        sweep(by_hand, tokenizer, [Count()], LENGTHS, results=path, progress=False)
    eager: Any = byte_model()
    eager.set_attn_implementation("eager")
    with pytest.raises(RunError, match=r"another attention implementation \(sdpa, this"):
        sweep(eager, tokenizer, [Count()], LENGTHS, results=path, progress=False)


def test_one_of_each_needs_no_list(model: Any, tokenizer: Any) -> None:
    found = sweep(model, tokenizer, Count(), 600, methods="yarn:2", progress=False)
    assert [(row.method, row.length) for row in found.rows] == [("yarn:2", 600)]


def test_memory_that_runs_out_fails_cells_and_not_the_sweep(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    small = Count(memory=700)
    result = sweep(model, tokenizer, [small], LENGTHS, results=path, progress=False)
    assert small.calls == [LENGTHS, (300,), (600,), (1200,)]
    assert [row.value for row in result.rows[:2]] == [1.0, 1.0]
    assert math.isnan(result.rows[2].value)
    assert result.rows[2].failed == "out of memory at 1200 tokens, one prompt at a time"
    again = sweep(model, tokenizer, [small], LENGTHS, results=path, progress=False)
    assert small.calls[4:] == [LENGTHS, (1200,)], "what failed is tried again, the rest is not"
    assert again.rows[:2] == result.rows[:2]


def test_nan_is_a_failure_and_not_a_wrong_answer(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    result = sweep(model, tokenizer, ["perplexity"], "256", progress=False)
    assert math.isnan(result.rows[0].value)
    assert result.rows[0].failed == "the logits hold NaN or infinity in 10 of 10"


def test_other_errors_come_through_and_the_model_is_given_back(model: Any, tokenizer: Any) -> None:
    class Broken(Count):
        def measure(self, *args: Any, **settings: Any) -> Measured:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        sweep(model, tokenizer, [Broken()], LENGTHS, methods=["yarn:2"], progress=False)
    assert longctx.patch_of(model) is None


def test_what_does_not_fit_is_refused_before_any_work(
    model: Any, tokenizer: Any, texts: tuple[str, ...]
) -> None:
    task = Count()

    def run(tasks: Any, lengths: Any = "256:1k", **settings: Any) -> None:
        sweep(model, tokenizer, tasks, lengths, progress=False, **settings)

    with pytest.raises(RunError, match=r"unknown task 'paskey'; did you mean 'passkey'\?"):
        run([task, "paskey"])
    with pytest.raises(RunError, match="no task to sweep: pass some of lines, longppl, multi_key"):
        run([])
    with pytest.raises(RunError, match="'perplexity' is asked for twice"):
        run(["perplexity", Perplexity(last=5)])
    with pytest.raises(RunError, match="'1x' is not a length"):
        run([task], "1x")
    with pytest.raises(RunError, match="batch_tokens=0"):
        run([task], batch_tokens=0)
    with pytest.raises(RunError, match="verify=-1: expected a whole number, 0"):
        run([task], verify=-1)
    with pytest.raises(RunError, match="batch_tokens='a': expected a whole number"):
        run([task], batch_tokens="a")
    with pytest.raises(RunError, match="adaptive=True: expected an Adaptive"):
        run([task], adaptive=True)
    with pytest.raises(RunError, match=r"class .*Count'> is not a task: pass an instance"):
        run([Count])
    with pytest.raises(DataError, match=r"(?s)task passkey: .*too short.*\ntask perplexity: "):
        run(["passkey", "perplexity"], "16,64")
    with pytest.raises(DataError, match="no document is long enough"):
        run([task, Perplexity(text=texts)], "4k")
    with pytest.raises(MethodError, match="factor"):
        run([task], methods=["none", "yarn:-1"])
    assert not task.calls


def test_a_table_of_learned_positions_is_a_limit(tokenizer: Any) -> None:
    config = GPT2Config(vocab_size=259, n_positions=512, n_embd=16, n_layer=1, n_head=2)
    config.bos_token_id = config.eos_token_id = 1
    model = GPT2LMHeadModel(config)
    result = sweep(model, tokenizer, ["perplexity"], [512], progress=False)
    assert math.isfinite(result.rows[0].value)
    with pytest.raises(ModelError, match="1024 tokens is beyond the 512 learned positions"):
        sweep(model, tokenizer, ["perplexity"], [512, 1024], progress=False)


def test_scaled_rope_is_replaced_only_when_told(tokenizer: Any) -> None:
    model: Any = byte_model()
    longctx.extend(model, "linear", factor=2.0)
    plain = type(model)(model.config)  # as plain transformers reads such a checkpoint
    del plain.config.longctx
    with pytest.raises(MethodError, match="replace=True"):
        sweep(plain, tokenizer, [Count()], [300], methods=["yarn:2"], progress=False)
    sweep(plain, tokenizer, [Count()], [300], methods=["yarn:2"], replace=True, progress=False)


def test_a_process_beside_others_runs_all_of_a_sweep_alone(
    monkeypatch: pytest.MonkeyPatch, texts: tuple[str, ...]
) -> None:
    task = Perplexity(last=64, windows=2, text=texts)

    def run(**how: Any) -> list[float]:
        found = sweep(byte_model(), byte_tokenizer(), [task], (300, 600), progress=False, **how)
        return [row.value for row in found.rows]

    whole = run()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(single_process=True) == whole
    with pytest.raises(RunError, match=r"2 processes share this sweep: pass `results`"):
        run()
