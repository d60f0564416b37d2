"""`longctx serve`: what clients of OpenAI's API are told, several at once, and what is refused."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import torch
import uvicorn

import longctx
from longctx.cli.main import main
from longctx.errors import RunError
from longctx.scoring.token_scores import score
from longctx.serving.engine import Ask, Drawn, Engine, Event, Failure, Job
from longctx.serving.requests import Reader
from longctx.serving.responses import Writer
from longctx.serving.server import application, bound_socket, serve
from longctx.serving.token_texts import TokenTexts

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
METHOD = "dual_chunk:factor=4,log_n=True"
LONG = [*range(3, 303)]  # ids of a prompt beyond the old window of 256


@dataclass
class Running:
    """A server in a thread of the test's process."""

    model: Any
    tokenizer: Any
    port: int
    engine: Engine
    client: openai.OpenAI

    def complete(self, prompt: Any, **settings: Any) -> Any:
        return self.client.completions.create(model="demo", prompt=prompt, **settings)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("POST", path, sent, {"Content-Type": "application/json", **headers})
            with connection.getresponse() as answer:
                return answer.status, json.loads(answer.read())


@contextmanager
def started(method: str) -> Generator[Running]:
    model, tokenizer = longctx.load("demo", device="cpu")
    tokenizer.chat_template = TEMPLATE
    longctx.extend(model, method)
    engine, place = Engine(model, tokenizer), bound_socket("127.0.0.1", 0)
    app = application(engine, Reader(model, tokenizer, "demo"), "demo")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([place],))
    thread.start()
    port = place.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield Running(model, tokenizer, port, engine, client)
    server.should_exit = True
    engine.close()
    thread.join()
    assert engine.join(10)
    place.close()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with started(METHOD) as found:
        yield found


def test_completions_say_what_generate_says(running: Running) -> None:
    prompts = ["The parser", "Once upon"]
    said = running.complete(prompts, max_tokens=8, temperature=0)
    wanted = longctx.generate(
        running.model, running.tokenizer, prompts, max_new_tokens=8, batch_size=1
    )
    assert [choice.text for choice in said.choices] == [*wanted.texts]
    assert [choice.finish_reason for choice in said.choices] == ["length", "length"]
    ids = [running.tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert said.usage.prompt_tokens == sum(map(len, ids))
    assert said.usage.completion_tokens == 16
    assert said.model == "demo"
    by_ids = running.complete(ids, max_tokens=8, temperature=0)
    assert [choice.text for choice in by_ids.choices] == [*wanted.texts]
    reader = Reader(running.model, running.tokenizer, "demo")
    assert reader.read({"prompt": "a"}, chat=False).asks[0].continues
    assert not reader.read({"messages": MESSAGES}, chat=True).asks[0].continues


def test_a_stream_joins_up_to_the_whole(running: Running) -> None:
    asked: Any = {
        "model": "demo",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "max_completion_tokens": 12,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = running.client.chat.completions.create(**asked)
    pieces = [*running.client.chat.completions.create(**asked, stream=True)]
    deltas = [piece.choices[0].delta for piece in pieces]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    shown = [piece.choices[0].logprobs for piece in pieces]
    streamed = [each for some in shown if some for each in some.content or ()]
    assert streamed == whole.choices[0].logprobs.content
    assert len(streamed) == whole.usage.completion_tokens
    assert all(len(each.top_logprobs) == 2 for each in streamed)
    counted = [*running.complete("Once", stream=True, stream_options={"include_usage": True})]
    assert counted[-1].usage.completion_tokens == 16
    assert all("usage" in piece.model_fields_set and not piece.usage for piece in counted[:-1])


def test_requests_at_once_do_not_disturb_each_other(running: Running) -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": LONG[: 40 * n], "max_tokens": 4 + n, "seed": n, "temperature": 0.8 * (n % 2)}
        for n in (1, 2, 3, 7)
    ]
    alone = [running.complete(**each).choices[0].text for each in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = [*pool.map(lambda each: running.complete(**each).choices[0].text, asked)]
    assert together == alone
    said = longctx.generate(running.model, running.tokenizer, [LONG[:80]], max_new_tokens=6, seed=2)
    assert alone[1] == said.texts[0]


def test_what_is_drawn_follows_from_seed_and_choice(running: Running) -> None:
    asked: dict[str, Any] = {"prompt": "The", "max_tokens": 8, "temperature": 1.2, "top_p": 0.9}
    two = [choice.text for choice in running.complete(**asked, seed=1, n=2).choices]
    assert two == [choice.text for choice in running.complete(**asked, seed=1, n=2).choices]
    assert two[0] != two[1]
    assert running.complete(**asked, seed=2).choices[0].text != two[0]


def test_a_stop_ends_it_and_is_not_part_of_it(running: Running) -> None:
    free = running.complete("The parser", max_tokens=24, temperature=0).choices[0].text
    stop = free[9:12]
    for stream in (False, True):
        said = running.complete(
            "The parser", max_tokens=24, temperature=0, stop=["\0", stop], stream=stream
        )
        pieces = [*said] if stream else [said]
        text = "".join(piece.choices[0].text for piece in pieces)
        assert text == free[: free.index(stop)]
        assert pieces[-1].choices[0].finish_reason == "stop"


def test_a_stream_tells_the_log_probabilities_of_a_stop_too(running: Running) -> None:
    free = running.complete("The parser", max_tokens=24, temperature=0).choices[0].text
    asked: Any = {"max_tokens": 24, "temperature": 0, "stop": free[6:10], "logprobs": 0}
    whole = running.complete("The parser", **asked)
    shown = [
        each.choices[0].logprobs for each in running.complete("The parser", **asked, stream=True)
    ]
    streamed = [token for some in shown if some for token in some.tokens]
    assert streamed == whole.choices[0].logprobs.tokens
    assert len(streamed) == whole.usage.completion_tokens


@torch.no_grad()
def test_log_probabilities_are_the_models(running: Running) -> None:
    log_p = running.model(torch.tensor([LONG])).logits[0].log_softmax(-1)
    said = running.complete(
        LONG, max_tokens=1, temperature=0, echo=True, logprobs=2, extra_body={"prompt_logprobs": 0}
    )
    choice = said.choices[0]
    found = choice.logprobs
    own = [log_p[at, token].item() for at, token in enumerate(LONG[1:])]
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:-1] == pytest.approx(own, abs=1e-4)
    assert found.token_logprobs[-1] == pytest.approx(log_p[-1].max().item(), abs=1e-4)
    assert len(found.tokens) == len(found.top_logprobs) == len(LONG) + 1
    best = [max(top, key=top.get) for top in found.top_logprobs[1:]]
    assert best == [TokenTexts(running.tokenizer).name(i) for i in log_p.argmax(-1).tolist()]
    listed = choice.model_extra["prompt_logprobs"]
    assert listed[0] is None
    for at, token in enumerate(LONG[1:]):
        entry = listed[at + 1][str(token)]
        assert entry["logprob"] == pytest.approx(own[at], abs=1e-4)
        assert entry["rank"] == int((log_p[at] >= log_p[at, token]).sum())
    scored = running.complete("The parser", max_tokens=0, echo=True, logprobs=0)
    assert scored.choices[0].text == "The parser"
    assert scored.usage.completion_tokens == 0
    offsets = scored.choices[0].logprobs.text_offset
    assert [("The parser")[at:] for at in offsets][:2] == ["The parser"] * 2  # <s> takes no room


def test_a_prompt_is_scored_once_for_all_its_continuations(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counted(*given: Any, **settings: Any) -> Any:
        read.append(given[1].shape[1])
        return score(*given, **settings)

    monkeypatch.setattr("longctx.serving.engine.score", counted)
    said = running.complete([LONG[:9], LONG[:5]], max_tokens=1, echo=True, logprobs=1, n=3)
    assert read == [9, 5]
    found = [choice.logprobs.token_logprobs for choice in said.choices]
    assert found[0][:9] == found[2][:9]
    assert [len(each) for each in found] == [10] * 3 + [6] * 3


def test_tokens_that_are_parts_of_characters_are_told_by_their_bytes(running: Running) -> None:
    text = "日本 😀x"
    found = running.complete(text, max_tokens=0, echo=True, logprobs=2).choices[0].logprobs
    assert len(set(found.tokens)) > 6
    assert all(name.startswith("bytes:\\x") for name in found.tokens[1:7])
    assert found.text_offset[1:8] == [0, 1, 1, 1, 2, 2, 2]
    assert all(len(top) >= 2 for top in found.top_logprobs[1:])
    texts = TokenTexts(running.tokenizer)
    ids = running.tokenizer(text)["input_ids"][1:]
    assert b"".join(map(texts.bytes_of, ids)) == text.encode()
    assert sum(map(texts.size, ids)) == len(text)


def test_others_are_answered_while_an_answer_is_written(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, healthy = Writer.whole, threading.Event()

    def slow(*given: Any) -> Any:
        assert healthy.wait(10)
        return whole(*given)

    monkeypatch.setattr(Writer, "whole", slow)
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(running.complete, "a", max_tokens=1)
        time.sleep(0.2)
        with closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=5)) as asked:
            asked.request("GET", "/health")
            with asked.getresponse() as answer:
                assert answer.status == 200
        healthy.set()
        assert said.result().usage.completion_tokens == 1


def test_offsets_of_a_stream_are_those_of_the_whole(running: Running) -> None:
    asked: Any = {"max_tokens": 16, "seed": 5, "logprobs": 1, "stop": ["\n\n\n", "zq z"]}
    whole = running.complete("The", **asked).choices[0].logprobs
    pieces = [each.choices[0].logprobs for each in running.complete("The", **asked, stream=True)]
    assert [at for each in pieces if each for at in each.text_offset] == whole.text_offset
    assert [token for each in pieces if each for token in each.tokens] == whole.tokens


MESSAGES = [{"role": "user", "content": "Hi"}]
HUGE = "ab " * 10**6
PART = {"type": "text", "text": None}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {"prompt": LONG * 4, "max_tokens": 1}, 400, "1,200 tokens and 1 are to"),
        ("completions", {"prompt": "a", "max_tokens": 1024}, 400, "window is 1,024"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a " * 4000}]}, 400, "wind"),
        ("completions", {"prompt": HUGE}, 400, "3,000,000 characters"),
        ("chat/completions", {"messages": [{"role": "user", "content": HUGE}]}, 400, "charact"),
        ("completions", {"prompt": [[5]] * 9, "n": 128}, 400, "at most 1,024 continuations"),
        ("completions", {"prompt": "a", "stop": ["b"] * 65}, 400, "stop: expected"),
        ("completions", {"prompt": "a", "stop": "b" * 1025}, 400, "stop: expected"),
        ("completions", {"prompt": ""}, 400, "empty"),
        ("completions", {"prompt": []}, 400, "no prompts"),
        ("completions", {"prompt": [5, 10**6]}, 400, "not in the model's vocabulary"),
        ("completions", {"prompt": MESSAGES}, 400, "chat/completions takes chats"),
        ("completions", {"prompt": [MESSAGES]}, 400, "chat/completions takes chats"),
        ("completions", {"prompt": "\ud800"}, 400, "not Unicode"),
        ("chat/completions", {"messages": [{"role": "\ud800", "content": "a"}]}, 400, "not Unic"),
        ("chat/completions", {"messages": [{"role": "user", "content": [PART]}]}, 400, "a part wi"),
        ("completions", {}, 400, "prompt"),
        ("completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature: expected"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature=-1"),
        ("completions", {"prompt": "a", "top_p": 0}, 400, "top_p=0"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens=0"),
        ("completions", {"prompt": "a", "logprobs": 99}, 400, "logprobs: expected"),
        ("completions", {"prompt": "a", "temprature": 1}, 400, "did you mean 'temperature'"),
        ("completions", {"prompt": "a", "temperatur" * 10**6: 1}, 400, "unknown field 'tempera"),
        ("completions", {"prompt": "a", "model": "b" * 10**6}, 404, f"model '{'b' * 59} is not"),
        ("completions", {"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty=1: this"),
        ("completions", {"prompt": "a", "echo": True, "stream": True}, 400, "stream with echo"),
        ("completions", {"prompt": "a", "model": "other"}, 404, "'other' is not served here"),
        ("completions", [], 400, "expected a JSON object"),
        ("completions", b"{", 400, "not JSON"),
        ("completions", b"[" * 100_000, 400, "not JSON"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0]: expected"),
        ("chat/completions", {"messages": MESSAGES, "top_logprobs": 2}, 400, "set logprobs"),
        ("nothing", {}, 404, "/v1/nothing is not served here"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(
    running: Running, path: str, body: Any, status: int, message: str
) -> None:
    found, answer = running.post(f"/v1/{path}", body)
    assert found == status
    assert message in answer["error"]["message"]
    assert answer["error"]["code"] == status


def test_fields_that_ask_for_nothing_are_taken(running: Running) -> None:
    idle: Any = {"presence_penalty": 0, "tools": [], "logit_bias": {}, "user": "me", "seed": None}
    status, _ = running.post(
        "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1, "temperature": 0, **idle}
    )
    assert status == 200
    for header in ("text/plain", ""):  # which a web page may send to any address unasked
        status, _ = running.post("/v1/completions", {"prompt": "a"}, **{"Content-Type": header})
        assert status == 415
    for header in ("application/json ; charset=utf-8", "Application/JSON"):
        body = {"prompt": "a", "max_tokens": 1}
        assert running.post("/v1/completions", body, **{"Content-Type": header})[0] == 200


def test_models_and_health_are_told(running: Running) -> None:
    model = running.client.models.list().data[0]
    assert model.id == "demo"
    assert model.model_dump()["max_model_len"] == 1024
    assert running.client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        running.client.models.retrieve("other")
    with closing(http.client.HTTPConnection("127.0.0.1", running.port)) as connection:
        connection.request("GET", "/health")
        with connection.getresponse() as answer:
            assert answer.status == 200
            answer.read()
        connection.request("GET", "/v1/completions")
        with connection.getresponse() as answer:
            assert (answer.status, answer.getheader("Allow")) == (405, "POST")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(
    running: Running, stream: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    body = {"prompt": "a", "max_tokens": 900, "stream": stream, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", running.port)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    if stream:
        with connection.getresponse() as answer:
            answer.read(40)
    else:
        time.sleep(0.3)
    connection.close()
    said = ""
    end = time.monotonic() + 30
    while "given up" not in said:
        assert time.monotonic() < end
        time.sleep(0.02)
        said += capsys.readouterr().err
    assert running.complete("a", max_tokens=2).usage.completion_tokens <= 2


def test_a_failure_is_told_and_the_next_request_is_answered(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("broken on purpose")

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    for fault, status in ((failing, 500), (full, 503)):
        with monkeypatch.context() as changed:
            changed.setattr(running.model, "generate", fault)
            found, answer = running.post("/v1/completions", {"prompt": "a"})
            assert found == status
            assert answer["error"]["type"] == "server_error"
            stream = running.complete("a", stream=True)
            with pytest.raises(openai.APIError):
                list(stream)
    assert running.complete("a", max_tokens=1).choices[0].finish_reason == "length"


def test_a_full_queue_is_told_at_once_and_closes_in_time(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(running.model, running.tokenizer, parallel=1, waiting=1)
    told: list[Event] = []
    jobs = [Job([Ask((5,), 1, Drawn(), 0)], told.append) for _ in range(3)]
    with engine._turns.turn():  # pyright: ignore[reportPrivateUsage]
        engine.submit(jobs[0])
        while engine.unavailable() is not None:  # until the thread has taken it
            time.sleep(0.01)
        engine.submit(jobs[1])
        full = engine.unavailable()
        assert full is not None
        engine.submit(jobs[2])
        assert told == [full]
        monkeypatch.setattr(running.engine, "unavailable", lambda: full)
        found, answer = running.post("/v1/completions", {"prompt": "a", "stream": True})
        assert (found, answer["error"]["message"]) == (503, full.message)
        engine.close()
    assert engine.join(10)
    assert [event.status for event in told if isinstance(event, Failure)] == [503] * 3


def test_methods_that_go_by_the_length_take_turns() -> None:
    asked = [LONG[:n] for n in (100, 250, 300)]
    with started("dynamic:4") as running:
        assert running.engine.parallel == 1
        with ThreadPoolExecutor(3) as pool:
            said = pool.map(lambda ids: running.complete(ids, max_tokens=8, temperature=0), asked)
            texts = [each.choices[0].text for each in said]
        wanted = [
            longctx.generate(running.model, running.tokenizer, [ids], max_new_tokens=8).texts[0]
            for ids in asked
        ]
        assert texts == wanted


def test_a_signal_ends_it_in_the_middle_of_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread")
    model, tokenizer = longctx.load("demo", device="cpu")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        place = bound_socket("127.0.0.1", 0)
        found: list[Any] = []

        def client(
            port: int = place.getsockname()[1], number: int = number, found: list[Any] = found
        ) -> None:
            url = f"http://127.0.0.1:{port}/v1"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as api:
                stream = api.completions.create(
                    model="demo", prompt="a", max_tokens=200, stream=True,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
                try:
                    for piece in stream:
                        if not found:
                            os.kill(os.getpid(), number)
                        found.append(piece)
                except openai.APIError as error:
                    found.append(error)

        thread = threading.Thread(target=client)
        thread.start()
        with place:
            serve(model, tokenizer, "demo", place)
        thread.join()
        assert "shutting down" in str(found[-1])
        assert len(found) < 100
        said = capsys.readouterr().err
        assert "ready: demo (256 tokens) at http://127.0.0.1:" in said
        assert said.endswith("longctx serve: stopped\n")
    assert {number: signal.getsignal(number) for number in before} == before


def test_an_address_that_cannot_be_had_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "demo", "--port", str(port)]) == 2
        assert f"cannot listen at 127.0.0.1 port {port}" in capsys.readouterr().err
    for host, port in (("127.0.0.1", 70_000), ("no.such.host.invalid", 0), ("203.0.113.1", 0)):
        with pytest.raises(RunError, match=r"cannot listen|expected 0"):
            bound_socket(host, port)
    assert main(["serve", "demo", "--parallel", "0"]) == 2
    assert "--parallel 0: expected 1 or more" in capsys.readouterr().err
