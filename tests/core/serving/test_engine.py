"""Jobs of the engine that nobody waits for any more."""

from __future__ import annotations

import time
from typing import Any

import pytest

import longctx
from longctx.serving.engine import Ask, Drawn, Engine, Event, Failure, Job

LONG = [*range(3, 303)]  # ids of a prompt beyond the old window of 256


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = longctx.load("demo", device="cpu")
    longctx.extend(model, "yarn:4")
    return model, tokenizer


@pytest.mark.parametrize(
    "ask", [Ask(tuple(LONG), 1, Drawn(), 0), Ask((5, 6), 0, Drawn(), 0, prompt_likeliest=0)]
)
def test_a_prompt_that_nobody_waits_for_is_not_read_to_its_end(
    loaded: tuple[Any, Any], ask: Ask
) -> None:
    model, tokenizer = loaded
    told: list[Event] = []
    passed: list[object] = []
    job = Job([ask], told.append)
    layers = model.model.layers
    first = layers[0].register_forward_hook(lambda *_: job.cancelled.set())
    last = layers[-1].register_forward_hook(lambda *_: passed.append(_))
    engine = Engine(model, tokenizer, parallel=1)
    engine.submit(job)
    assert job.cancelled.wait(10)
    first.remove()
    other = Job([Ask(tuple(LONG), 1, Drawn(), 0)], told.append)
    engine.submit(other)
    while len(told) < 2:
        time.sleep(0.01)
    last.remove()
    engine.close()
    assert engine.join(10)
    assert len(passed) == 1  # of the other job
    said = longctx.generate(model, tokenizer, [LONG], max_new_tokens=1)
    assert [said.texts[0]] * 2 == [getattr(event, "text", None) for event in told]


def test_jobs_that_were_given_up_keep_no_place(loaded: tuple[Any, Any]) -> None:
    engine = Engine(*loaded, parallel=1, waiting=2)
    told: list[Event] = []
    jobs = [Job([Ask((5,), 1, Drawn(), 0)], told.append) for _ in range(4)]
    with engine._turns.turn():  # pyright: ignore[reportPrivateUsage]
        engine.submit(jobs[0])
        while engine._jobs.qsize():  # pyright: ignore[reportPrivateUsage]
            time.sleep(0.01)
        engine.submit(jobs[1])
        engine.submit(jobs[2])
        assert engine.unavailable() is not None
        jobs[1].cancelled.set()
        assert engine.unavailable() is None
        engine.submit(jobs[3])
        assert engine.unavailable() is not None
        for job in (jobs[0], jobs[2]):
            job.cancelled.set()
    end = time.monotonic() + 10
    while not any(getattr(event, "finish_reason", None) for event in told):  # the last job's
        assert time.monotonic() < end
        time.sleep(0.01)
    engine.close()
    assert engine.join(10)
    assert not any(isinstance(event, Failure) for event in told)
