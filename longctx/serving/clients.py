"""Asking a running server for the log-probabilities of a prompt's tokens, engine by engine.

Every client sends token ids, so that the server's tokenizer has no part in the numbers, and says
what the server holds for its window and its tokenization of a text.

Sources: vLLM's OpenAI-compatible server (`prompt_logprobs`), llama.cpp's tools/server/README.md
(`/completion`, `/props`, `/tokenize`), SGLang's native API documentation (`/generate`,
`/get_server_info`, `/tokenize`), `transformers serve` (`/v1/completions`, which has no
log-probabilities).
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import math
import reprlib
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Literal, Protocol, get_args
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..errors import RunError

__all__ = [
    "SERVERS",
    "LlamaCpp",
    "RefusedError",
    "Scorer",
    "Server",
    "SgLang",
    "Transformers",
    "VLlm",
    "check_url",
    "client_of",
]  # fmt: skip

Server = Literal["vllm", "sglang", "llama.cpp", "transformers"]
SERVERS: tuple[Server, ...] = get_args(Server)
_LARGEST = 1 << 30
"""Bytes of an answer that are read at most."""
_MALFORMED = (KeyError, IndexError, TypeError, ValueError, OverflowError)
"""What reading an answer of another form raises; JSON knows Infinity, and numbers of any size."""


class RefusedError(RunError):
    """The server answered that it does not take a request.

    Args:
        message: what it said.
        status: of the answer, as HTTP names it.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Http:
    """A server's address, and JSON to and from it."""

    url: str
    seconds: float

    def get(self, path: str) -> Any:
        return self._ask(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None) -> Any:
        where = f"{self.url}{path}"
        found: SimpleQueue[bytes | Exception] = SimpleQueue()

        def ask() -> None:
            try:
                found.put(self._exchanged(where, body))
            except Exception as error:
                found.put(error)

        # A socket's time-out begins anew with each byte. This one is for the whole answer.
        Thread(target=ask, daemon=True).start()
        try:
            text = found.get(timeout=self.seconds)
        except Empty as error:
            raise self._late(where) from error
        if isinstance(text, Exception):
            raise text
        if len(text) > _LARGEST:
            raise RunError(f"{where} answered more than {_LARGEST >> 20} MiB: is it the engine?")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RunError(
                f"{where} did not answer with JSON ({text[:60]!r}): is it the engine's address?"
            ) from error

    def _exchanged(self, where: str, body: bytes | None) -> bytes:
        """The bytes of an answer."""
        request = urllib.request.Request(
            where, data=body, headers={"Content-Type": "application/json"}
        )
        direct = [urllib.request.ProxyHandler({})] if _is_here(self.url) else []
        opener = urllib.request.build_opener(_Unredirected, *direct)
        try:
            with opener.open(request, timeout=self.seconds) as answer:
                return answer.read(_LARGEST + 1)
        except urllib.error.HTTPError as error:
            with error:  # which holds the connection
                said = f"{where} answered {error.code}: {_said(error)}"
            if to := error.headers.get("Location"):
                raise RunError(
                    f"{where} sends requests on to {to!r:.200}, which are not sent there: name the "
                    "engine's own address by --url."
                ) from error
            raise RefusedError(said, error.code) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, TimeoutError) or "timed out" in str(error):
                raise self._late(where) from error
            if isinstance(error, http.client.HTTPException):
                raise RunError(
                    f"{where} broke off, or does not speak HTTP ({error!r:.80}): see what the "
                    "server says, or name its address by --url."
                ) from error
            raise RunError(
                f"cannot reach {where} ({error}): start the server, or name its address by --url."
            ) from error

    def _late(self, where: str) -> RunError:
        return RunError(
            f"{where} did not answer in {self.seconds:g} seconds: wait longer (--timeout), "
            "or ask for shorter --lengths."
        )


class _Unredirected(urllib.request.HTTPRedirectHandler):
    """Follows no server to another address, whose answers would be taken for the engine's."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None leaves the answer an HTTPError."""


def _is_here(url: str) -> bool:
    """Whether a server is on this machine, where no proxy for other machines belongs between."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


def _said(error: urllib.error.HTTPError) -> str:
    """What an error's body says, short."""
    try:
        text = error.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException) as fault:
        return str(fault)
    try:
        body: Any = json.loads(text)
    except (ValueError, RecursionError):
        body = text
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    return " ".join(str(body).split())[:300]


class Scorer(Protocol):
    """What is asked of a server that knows log-probabilities."""

    def window(self) -> int | None:
        """Tokens that it takes, prompt and answer together; None where it does not say."""
        ...

    def tokenize(self, text: str) -> list[int] | None:
        """A text's ids with the special tokens around it; None where it has no such address."""
        ...

    def logprobs(self, ids: Sequence[int], places: Sequence[int]) -> Tensor:
        """Log-probabilities of the tokens at some places, each given all before it, float64 [N].

        Raises:
            RefusedError: the server does not take the prompt.
            RunError: no server, or an answer of another form.
        """
        ...


@dataclass(frozen=True, slots=True)
class VLlm:
    """vLLM's OpenAI-compatible server."""

    http: _Http

    def _model(self) -> dict[str, Any]:
        found = self.http.get("/v1/models")
        try:
            return {**found["data"][0], "id": _text(found["data"][0]["id"])}
        except _MALFORMED as error:
            raise _unexpected(self.http, "/v1/models", found) from error

    def window(self) -> int | None:
        """`max_model_len`."""
        return _whole(self._model().get("max_model_len"))

    def tokenize(self, text: str) -> list[int] | None:
        """By `/tokenize`."""
        return _tokens(self.http, {"prompt": text, "add_special_tokens": True})

    def logprobs(self, ids: Sequence[int], places: Sequence[int]) -> Tensor:
        """All tokens of the prompt in one request."""
        body = {"model": self._model()["id"], "prompt": [*ids], "max_tokens": 1}
        answer = self.http.post("/v1/completions", {**body, "temperature": 0, "prompt_logprobs": 1})
        try:
            rows: Any = answer["choices"][0]["prompt_logprobs"]
            return _finite([float(rows[p][str(ids[p])]["logprob"]) for p in places])
        except _MALFORMED as error:
            raise _unexpected(self.http, "/v1/completions", answer) from error


@dataclass(frozen=True, slots=True)
class SgLang:
    """SGLang's own interface; written from its documentation, not run here."""

    http: _Http

    def window(self) -> int | None:
        """`context_length` of the server's arguments, where it was given."""
        return _whole(_entry(self.http.get("/get_server_info"), "context_length"))

    def tokenize(self, text: str) -> list[int] | None:
        """By `/tokenize`."""
        return _tokens(self.http, {"prompt": text, "add_special_tokens": True})

    def logprobs(self, ids: Sequence[int], places: Sequence[int]) -> Tensor:
        """All tokens of the prompt in one request."""
        answer = self.http.post(
            "/generate",
            {
                "input_ids": [*ids],
                "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
            },
        )
        try:
            rows: Any = answer["meta_info"]["input_token_logprobs"]
            if [rows[p][1] for p in places] != [ids[p] for p in places]:
                raise ValueError("other tokens")
            return _finite([float(rows[p][0]) for p in places])
        except _MALFORMED as error:
            raise _unexpected(self.http, "/generate", answer) from error


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp's server, which scores no prompts: one token is generated after each place."""

    http: _Http
    vocabulary: int
    """Tokens of the model: the log-probabilities of all of them are asked for."""

    def window(self) -> int | None:
        """`n_ctx` of a slot."""
        settings = _entry(self.http.get("/props"), "default_generation_settings")
        return _whole(_entry(settings, "n_ctx"))

    def tokenize(self, text: str) -> list[int] | None:
        """By `/tokenize`."""
        return _tokens(self.http, {"content": text, "add_special": True})

    def logprobs(self, ids: Sequence[int], places: Sequence[int]) -> Tensor:
        """One request a place, in ascending order, so that the cache holds what was read.

        The token that is generated is chosen by a bias, which the probabilities are without: of
        one that ends inside a character the server would say nothing.
        """
        said = _tokens(self.http, {"content": "a", "add_special": False})
        bias = [[token, 1000.0] for token in (said or [])[-1:]]
        found: list[float] = []
        for place in places:
            body = {"prompt": [*ids[:place]], "n_predict": 1, "n_probs": self.vocabulary}
            answer = self.http.post(
                "/completion",
                {
                    **body,
                    "temperature": 0,
                    "logit_bias": bias,
                    "post_sampling_probs": False,
                    "cache_prompt": True,
                },
            )
            try:
                first = answer["completion_probabilities"][0]
                by_id = {int(one["id"]): one["logprob"] for one in first["top_logprobs"]}
                found.append(float(by_id[ids[place]]))
                _finite(found[-1:])
            except _MALFORMED as error:
                raise _unexpected(self.http, "/completion", answer) from error
        return _finite(found)


@dataclass(frozen=True, slots=True)
class Transformers:
    """`transformers serve`, which gives text alone."""

    http: _Http

    def complete(self, prompt: str, tokens: int, model: str) -> str:
        """What greedy decoding says after a text.

        Args:
            prompt: the text, without special tokens.
            tokens: how many at most.
            model: the name or folder that the server was started on.
        """
        answer = self.http.post(
            "/v1/completions",
            {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0},
        )
        try:
            return _text(answer["choices"][0]["text"])
        except _MALFORMED as error:
            raise _unexpected(self.http, "/v1/completions", answer) from error


def client_of(
    server: Server, url: str, *, vocabulary: int, seconds: float = 600.0
) -> Scorer | Transformers:
    """A client of a running server.

    Args:
        server: which engine.
        url: its address, as http://host:port.
        vocabulary: tokens of the model.
        seconds: longest wait for one answer, its last byte included.

    Raises:
        RunError: not an http address.
    """
    check_url(url)
    at = _Http(url.rstrip("/").removesuffix("/v1"), seconds)
    if server == "llama.cpp":
        return LlamaCpp(at, vocabulary)
    return {"vllm": VLlm, "sglang": SgLang, "transformers": Transformers}[server](at)


def check_url(url: str) -> None:
    """Refuse what is not an http address (RunError)."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 address that cannot be
        fine = False
    if not fine:
        raise RunError(f"--url {url!r}: expected an address such as http://127.0.0.1:8000.")


def _tokens(http: _Http, body: dict[str, Any]) -> list[int] | None:
    try:
        found = http.post("/tokenize", body)
    except RefusedError as error:
        if error.status in (404, 405):  # a server without this address
            return None
        raise
    tokens: Any = _entry(found, "tokens")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise _unexpected(http, "/tokenize", found)
    return tokens


def _entry(value: Any, key: str) -> Any:
    """An entry of a JSON object, None where it is no object or has none."""
    return value.get(key) if isinstance(value, dict) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _finite(values: list[float]) -> Tensor:
    if not all(map(math.isfinite, values)):
        raise ValueError("a log-probability that is not finite")
    return torch.tensor(values, dtype=torch.float64)


def _unexpected(http: _Http, path: str, answer: Any) -> RunError:
    return RunError(
        f"{http.url}{path} answered in another form than expected ({reprlib.repr(answer):.120}): "
        "is it the engine that --engine names, and of a present version?"
    )
