"""Every fault that is planted in a server is found and named, and a right one passes."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import longctx
from longctx.cli.main import main
from longctx.errors import RunError
from longctx.model import rotary_of
from longctx.serving import check_text
from longctx.serving.check import Checked, CheckSettings, check_server, lengths_of, window_of_model
from longctx.serving.clients import Scorer, client_of

from .fake_server import Served, running

SETTINGS = CheckSettings(lengths=(100, 300), positions=80)


def extended(method: str | None = "yarn:4") -> tuple[Any, Any]:
    model, tokenizer = longctx.load("demo", device="cpu", dtype="float32")
    if method is not None:
        longctx.extend(model, method)
    return model, tokenizer


def check(served: Served, engine: Any = "vllm", **changes: Any) -> Checked:
    model, tokenizer = extended()
    settings = replace(SETTINGS, **changes)
    with running(served) as url:
        client: Any = client_of(engine, url, vocabulary=1024)
        return check_server(model, tokenizer, client, settings)


@pytest.mark.parametrize(("engine", "positions"), [("vllm", None), ("sglang", 7), ("llama.cpp", 4)])
def test_a_server_that_computes_the_checkpoint_passes(engine: str, positions: int | None) -> None:
    found = check(Served(*extended(), window=1024), engine, positions=positions)
    assert found.ok, str(found)
    assert [row.length for row in found.rows] == [100, 300]
    assert [row.compared for row in found.rows] == [positions or n for n in (99, 299)]
    assert all(row.largest < 1e-4 for row in found.rows)
    assert all(row.between is not None and row.between > 0.01 for row in found.rows)
    assert "computes this checkpoint" in str(found)


def test_a_dropped_scaling_is_called_that() -> None:
    found = check(Served(*extended(None), window=1024))
    assert found.faults == ("the scaling was dropped: the server computes the unextended model",)
    assert all(row.plain is not None and row.plain < 1e-4 for row in found.rows)
    assert "FAULT the scaling was dropped" in str(found)


@pytest.mark.parametrize(
    ("factor", "said"), [(1.0, "no temperature"), (math.sqrt(1.25), "longrope's usual temperature")]
)
def test_a_wrong_temperature_is_called_that(factor: float, said: str) -> None:
    model, tokenizer = extended()
    native: Any = rotary_of(model)
    native.native.attention_scaling = factor
    [fault] = check(Served(model, tokenizer, window=1024)).faults
    assert fault.startswith("wrong temperature: ")
    assert said in fault


@pytest.mark.parametrize("window", [512, 4096])
def test_a_wrong_window_is_called_that(window: int) -> None:
    [fault] = check(Served(*extended(), window=window)).faults
    assert fault.startswith(f"wrong window: the server takes {window:,} tokens")


def test_a_refused_prompt_is_a_fault_and_the_others_are_compared() -> None:
    found = check(Served(*extended(), window=200))
    assert [row.length for row in found.rows] == [100]
    assert any("does not take 300 tokens" in fault for fault in found.faults)


def test_another_tokenizer_is_called_that() -> None:
    model, tokenizer = extended()
    tokenizer.backend_tokenizer.pre_tokenizer = None
    [fault] = check(Served(model, tokenizer, window=1024)).faults
    assert fault.startswith("another tokenizer")


def test_a_tokenizer_that_cannot_be_compared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Served.post
    monkeypatch.setattr(Served, "post", lambda *to: None if to[1] == "/tokenize" else whole(*to))
    found = check(Served(*extended(), window=1024), lengths=(300,))
    assert found.ok
    assert "note: the server has no /tokenize" in str(found)
    monkeypatch.setattr(Served, "post", lambda *_: "broken")
    with pytest.raises(RunError, match="/tokenize answered 400: broken"):
        check(Served(*extended(), window=1024))


def test_a_bfloat16_server_is_called_that_and_passes_as_one() -> None:
    model, tokenizer = extended()
    served = Served(model.to(torch.bfloat16), tokenizer, window=1024)
    [fault] = check(served).faults
    assert "half precision's rounding" in fault
    found = check(served, dtype="bfloat16")
    assert found.ok, str(found)
    assert all(row.allowed > 1e-2 for row in found.rows)


def test_few_positions_are_judged_by_the_rounding_of_all() -> None:
    model, tokenizer = extended()
    served = Served(model.to(torch.bfloat16), tokenizer, window=1024)
    found = check(served, dtype="bfloat16", positions=1)
    assert found.ok, str(found)
    assert all(row.allowed > 1e-2 and (row.between or 0) > row.allowed for row in found.rows)
    found = check(Served(*extended(None), window=1024), positions=1)
    assert found.faults[0].startswith("the scaling was dropped")


@pytest.mark.parametrize("served", [None, "dual_chunk:factor=4"])
def test_lengths_that_cannot_tell_the_models_apart_decide_nothing(served: str | None) -> None:
    """Inside the old window dual chunk attention computes what the unextended model does."""
    model, tokenizer = extended("dual_chunk:factor=4")
    with running(Served(*extended(served), window=1024)) as url:
        client: Any = client_of("vllm", url, vocabulary=1024)
        [fault] = check_server(model, tokenizer, client, replace(SETTINGS, lengths=(100,))).faults
    assert fault.startswith("undecided: the server's numbers fit the unextended model as well")


def test_what_half_precision_hides_is_decided_by_what_most_tokens_are_nearer_to() -> None:
    """A temperature so small that it stays within the rounding of bfloat16."""
    method = "yarn:factor=4,attention_factor=1.004"
    for own, ok in ((1.004, True), (1.0, False)):
        served, tokenizer = extended(f"yarn:factor=4,attention_factor={own}")
        model, _ = extended(method)
        with running(Served(served.to(torch.bfloat16), tokenizer, window=1024)) as url:
            client: Any = client_of("vllm", url, vocabulary=1024)
            found = check_server(model, tokenizer, client, replace(SETTINGS, dtype="bfloat16"))
        assert found.ok is ok, str(found)
        assert ok or found.faults[0].startswith(("undecided", "wrong temperature"))


def test_a_bfloat16_server_that_drops_the_scaling_is_found() -> None:
    model, tokenizer = extended(None)
    served = Served(model.to(torch.bfloat16), tokenizer, window=1024)
    [fault] = check(served, dtype="bfloat16").faults
    assert fault.startswith("the scaling was dropped")


def test_other_weights_are_another_model() -> None:
    model, tokenizer = extended()
    with torch.no_grad():
        layer: Any = model.get_submodule("model.layers.1.self_attn.q_proj")
        layer.weight.mul_(1.5)
    [fault] = check(Served(model, tokenizer, window=1024)).faults
    assert fault.startswith("another model: log-probabilities differ by up to")


def test_a_checkpoint_with_scaling_of_its_own_is_held_against_the_unscaled(tmp_path: Path) -> None:
    """Scaling that longctx has no record of is taken off by the config."""
    model, tokenizer = extended()
    longctx.save(model, tokenizer, tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    del config["longctx"]
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    foreign, _ = longctx.load(tmp_path / "x", device="cpu", dtype="float32")
    assert window_of_model(foreign) == (1024, 256)
    with running(Served(*extended(None), window=1024)) as url:
        client: Any = client_of("vllm", url, vocabulary=1024)
        found = check_server(foreign, tokenizer, client, SETTINGS)
    assert found.faults == ("the scaling was dropped: the server computes the unextended model",)


def test_an_unextended_model_has_nothing_to_be_held_against() -> None:
    model, tokenizer = extended(None)
    with running(Served(*extended(None), window=256)) as url:
        client: Any = client_of("vllm", url, vocabulary=1024)
        found = check_server(model, tokenizer, client)
    assert found.ok
    assert [row.plain for row in found.rows] == [None]
    assert [row.length for row in found.rows] == [255]


def test_lengths_are_those_at_which_windows_end() -> None:
    assert lengths_of(1024, 256) == (256, 512, 1023)
    assert lengths_of(512, 256) == (256, 511)
    assert lengths_of(256, 256) == (255,)
    assert window_of_model(extended("dynamic:4")[0]) == (1024, 256)


def test_dynamic_is_read_at_the_base_of_the_whole_window() -> None:
    """As vLLM computes it with the overrides of serve-flags: one base for every request."""
    served, tokenizer = extended("dynamic:4")
    patch = longctx.patch_of(served)
    assert patch is not None
    begun = patch.method.reserve(served, 1024)
    with begun, running(Served(served, tokenizer, window=1024)) as url:
        client: Any = client_of("vllm", url, vocabulary=1024)
        model, _ = extended("dynamic:4")
        assert check_server(model, tokenizer, client, SETTINGS).ok


@pytest.fixture
def demo_yarn(tmp_path: Path) -> Path:
    model, tokenizer = extended()
    longctx.save(model, tokenizer, tmp_path / "demo-yarn")
    return tmp_path / "demo-yarn"


def test_the_command_writes_figures_and_says_by_its_exit_code(
    demo_yarn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve-check", str(demo_yarn), "--engine", "vllm", "--lengths", "100", "--url"]
    with running(Served(*extended(), window=1024)) as url:
        assert main([*words, url, "--out", str(tmp_path / "x.json")]) == 0
        assert "computes this checkpoint" in capsys.readouterr().out
        assert main([*words, url, "--out", str(tmp_path / "x.json")]) == 2
    assert json.loads((tmp_path / "x.json").read_text())["ok"]
    with running(Served(*extended(None), window=1024)) as url:
        assert main([*words, url]) == 1
    assert "FAULT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/hosts", "expected an address such as http"),
        ("nonsense", "expected an address such as http"),
        ("http://127.0.0.1:port", "expected an address such as http"),
        ("http://127.0.0.1:9", "start the server"),
    ],
)
def test_an_address_without_a_server_is_bad_usage(
    url: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve-check", "demo", "--engine", "vllm", "--url", url]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "nan", "1e30"])
def test_a_wait_that_cannot_be_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["serve-check", "demo", "--engine", "vllm", "--url", "http://127.0.0.1:9"]
    assert main([*words, "--timeout", seconds]) == 2
    assert "expected seconds above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "did not answer with JSON"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{", "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + b"[" * 9999, "answer with JSON"),
        (b"", "did not answer in 0.3 seconds"),
    ],
)
def test_a_server_that_breaks_off_or_says_nothing_is_told(sent: bytes, said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:

        def answer() -> None:
            connection, _ = place.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(sent)
                if not sent:
                    connection.recv(1000)  # until the client gives up

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        client: Any = client_of("vllm", url, vocabulary=9, seconds=60 if sent else 0.3)
        with pytest.raises(RunError, match=said):
            client.window()
        thread.join()


def test_an_answer_that_comes_byte_by_byte_is_not_waited_for() -> None:
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as place:

        def answer() -> None:
            connection, _ = place.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
                while not over.wait(0.05):
                    connection.sendall(b" ")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        client: Any = client_of("vllm", url, vocabulary=9, seconds=0.5)
        try:
            with pytest.raises(RunError, match=r"did not answer in 0\.5 seconds"):
                client.window()
        finally:
            over.set()
            thread.join()


def test_neither_a_proxy_nor_a_redirection_stands_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with running(_Says({})) as url:
        for own in (url, url.replace("127.0.0.1", "localhost")):
            client: Any = client_of("vllm", own, vocabulary=9)
            assert client.window() == 1024
        with socket.create_server(("127.0.0.1", 0)) as place:

            def answer() -> None:
                connection, _ = place.accept()
                with connection:
                    connection.recv(1000)
                    to = f"Location: {url}/v1/models".encode()
                    connection.sendall(
                        b"HTTP/1.1 302 Found\r\n" + to + b"\r\nContent-Length: 0\r\n\r\n"
                    )

            thread = threading.Thread(target=answer)
            thread.start()
            client = client_of("vllm", f"http://127.0.0.1:{place.getsockname()[1]}", vocabulary=9)
            with pytest.raises(RunError, match="sends requests on to"):
                client.window()
            thread.join()


def test_more_tokens_than_ours_are_shown_where_they_begin() -> None:
    model, tokenizer = extended()
    served = Served(model, tokenizer, 1024)
    with running(served) as url:
        client: Any = client_of("vllm", url, vocabulary=1024)
        longer = _Longer(client)
        found = check_server(extended()[0], tokenizer, longer, SETTINGS)  # pyright: ignore[reportArgumentType]
    assert "the server makes" in found.faults[0]
    assert found.faults[0].endswith("is [2], ours []")


class _Longer:
    """A client of a server that puts EOS behind every text."""

    def __init__(self, client: Any) -> None:
        self.window = client.window
        self.logprobs = client.logprobs
        self.tokenize = lambda text: [*client.tokenize(text), 2]


@pytest.mark.parametrize("answer", [{}, {"data": []}, {"data": [{}]}, {"data": [{"id": "x"}]}, [1]])
def test_an_answer_of_another_form_is_named(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(nn.Identity(), None, 1024)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(Served, "get", lambda *_: answer)
    monkeypatch.setattr(Served, "post", lambda *_: {"choices": [{}]})
    with running(served) as url:
        client: Any = client_of("vllm", url, vocabulary=1024)
        with pytest.raises(RunError, match=r"another form than expected|is it the engine"):
            client.logprobs([1, 2, 3], [1, 2])


HUGE = int("9" * 400)
INFINITE = float("inf")


@pytest.mark.parametrize(
    ("engine", "answer"),
    [
        ("vllm", {"choices": [{"prompt_logprobs": [None, {"2": {"logprob": HUGE}}]}]}),
        ("vllm", {"choices": [{"prompt_logprobs": [None, {"2": {"logprob": -INFINITE}}]}]}),
        ("sglang", {"meta_info": {"input_token_logprobs": [[None, 1], [HUGE, 2]]}}),
        ("llama.cpp", {"completion_probabilities": [{"top_logprobs": [{"id": INFINITE}]}]}),
        *(
            ("llama.cpp", {"completion_probabilities": [{"top_logprobs": [one]}]})
            for one in ({"id": 2, "logprob": HUGE}, {"id": 2, "logprob": INFINITE})
        ),
        ("transformers", {"choices": [{"text": None}]}),
    ],
)
def test_numbers_that_cannot_be_are_an_answer_of_another_form(engine: Any, answer: Any) -> None:
    served = _Says(answer)
    with running(served) as url:
        client: Any = client_of(engine, url, vocabulary=9)
        with pytest.raises(RunError, match="another form than expected"):
            if engine == "transformers":
                client.complete("a", 1, "x")
            else:
                client.logprobs([1, 2], [1])


@pytest.mark.parametrize("name", [5, None, ["x"]])
def test_a_model_without_a_name_is_an_answer_of_another_form(
    name: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Served, "get", lambda *_: {"data": [{"id": name, "max_model_len": 9}]})
    with running(_Says({})) as url:
        client: Any = client_of("vllm", url, vocabulary=9)
        with pytest.raises(RunError, match="another form than expected"):
            client.logprobs([1, 2], [1])


class _Says(Served):
    """A server that says one thing, and splits every text into one token."""

    def __init__(self, answer: Any) -> None:
        nothing: Any = None
        super().__init__(nothing, nothing, 1024)
        self.answer = answer

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return {"tokens": [3]} if path == "/tokenize" else self.answer


def test_lengths_beyond_the_window_are_refused() -> None:
    model, tokenizer = extended()
    scorer: Any = _Nothing()
    client: Scorer = scorer
    with pytest.raises(RunError, match="expected 2 to 1023 tokens"):
        check_server(model, tokenizer, client, CheckSettings(lengths=(1024,)))


class _Nothing:
    window: Callable[..., None] = staticmethod(lambda: None)


@pytest.mark.parametrize("method", ["yarn:4", None])
def test_greedy_texts_are_compared_where_there_is_nothing_else(
    method: str | None,
    demo_yarn: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check_text, "_ANSWER", 12)
    words = ["serve-check", str(demo_yarn), "--engine", "transformers", "--lengths", "270"]
    with running(Served(*extended(method), window=1024)) as url:
        assert main([*words, "--url", url]) == (0 if method else 1)
    said = capsys.readouterr().out
    assert (
        "the server's answers are this checkpoint's" if method else "scaling was dropped"
    ) in said
