"""OpenAI's API over HTTP for one model that is loaded already.

transformers' own server, `transformers serve`, gives no log-probabilities, draws from torch's one
generator whatever other requests do, reads prompts beyond the window, and keeps its parts private.
So this is a small one on Starlette and uvicorn: /v1/completions, /v1/chat/completions, /v1/models,
/health.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LongctxError, RunError
from .engine import Engine, Event, Failure, Job, Said
from .requests import Asked, Reader, UnknownModelError
from .responses import Writer, error_body
from .token_texts import TokenTexts

__all__ = ["application", "bound_socket", "serve"]

_LARGEST = 64 << 20  # bytes of a request
_GONE = 499  # what logs call a client that went away
_PATIENCE = 5  # seconds that a stopped server waits for what is being read


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has the address, before it listens.

    Raises:
        RunError: the port is in use, or the address is not one of this machine.
    """
    if not 0 <= port < 1 << 16:
        raise RunError(f"--port {port}: expected 0 (any that is free) to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise _unusable(host, port, error) from error
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise _unusable(host, port, error) from error
    return made


def _unusable(host: object, port: object, error: Exception) -> RunError:
    return RunError(
        f"cannot listen at {host} port {port} ({error}): name another --port or --host."
    )


def serve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    place: socket.socket,
    *,
    parallel: int = 4,
) -> bool:
    """Answer requests until the process is interrupted (SIGINT) or terminated (SIGTERM).

    Args:
        model: in place, patched or not.
        tokenizer: the model's.
        name: what requests call the model.
        place: a socket that is bound; see `bound_socket`.
        parallel: requests that are answered at once.

    Returns:
        Whether all work has ended; False where a forward pass goes on in another thread, which
        nothing can interrupt.

    Raises:
        RunError: another process has begun to listen there.
    """
    host, port = place.getsockname()[:2]
    try:
        place.listen(128)
    except OSError as error:
        raise _unusable(host, port, error) from error
    engine = Engine(model, tokenizer, parallel=parallel)
    reader = Reader(model, tokenizer, name)
    config = uvicorn.Config(
        application(engine, reader, name),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=_PATIENCE,
    )
    window = "any length" if reader.window is None else f"{reader.window:,} tokens"
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    server = _Server(config, engine)
    # uvicorn has handlers of its own while it runs, and raises the signal again at its end.
    before = {
        number: signal.signal(number, server.handle_exit)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        _say(f"ready: {name} ({window}) at {url}; interrupt to stop")
        server.run(sockets=[place])
    finally:
        engine.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    ended = engine.join(_PATIENCE)
    _say("stopped" if ended else "stopped in the middle of a forward pass")
    return ended


def _say(text: str) -> None:
    print(f"longctx serve: {text}", file=sys.stderr, flush=True)


class _Server(uvicorn.Server):
    """Ends what is being generated when it is stopped, instead of waiting for it."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop by a signal."""
        self._engine.close()
        super().handle_exit(sig, frame)


def application(engine: Engine, reader: Reader, name: str) -> Starlette:
    """The application that answers HTTP requests.

    Args:
        engine: has the model.
        reader: reads requests for it.
        name: what requests call the model.
    """
    made = int(time.time())
    card = {
        "id": name,
        "object": "model",
        "created": made,
        "owned_by": "longctx",
        "max_model_len": reader.window,
    }
    reading = asyncio.Lock()  # one tokenizer, which threads must not share
    texts = TokenTexts(engine.tokenizer)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] == name:
            return JSONResponse(card)
        return _refusal(404, f"there is no model {request.path_params['name']!r} here.")

    async def completions(request: Request) -> Response:
        return await answered(request, chat=False)

    async def chats(request: Request) -> Response:
        return await answered(request, chat=True)

    async def answered(request: Request, *, chat: bool) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0]
        if kind.strip().lower() != "application/json":
            return _refusal(415, "expected the header Content-Type: application/json.")
        begin = time.perf_counter()
        try:
            body = await _body(request)
            async with reading:
                asked = await asyncio.to_thread(reader.read, body, chat=chat)
        except UnknownModelError as error:
            return _refusal(404, str(error))
        except _TooLargeError as error:
            return _refusal(413, str(error))
        except LongctxError as error:
            return _refusal(400, str(error))
        except ClientDisconnect:
            return Response(status_code=_GONE)
        if (failure := engine.unavailable()) is not None:  # before a stream sends status 200
            return _refusal(failure.status, failure.message)
        writer = Writer(asked, texts, name)
        work = _Work(engine, asked, begin)
        if asked.stream:
            return StreamingResponse(_streamed(work, writer), media_type="text/event-stream")
        return await _whole(request, work, writer)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chats, methods=["POST"]),
        ],
        exception_handlers={404: _not_found, 405: _not_found, 500: _broken},
    )


class _TooLargeError(RunError):
    """A request of more bytes than are read."""


async def _body(request: Request) -> object:
    """What the JSON of a request says.

    Raises:
        RunError: it is too large, or not JSON.
    """
    read = bytearray()
    async for part in request.stream():
        read += part
        if len(read) > _LARGEST:
            raise _TooLargeError(f"the request is larger than {_LARGEST >> 20} MiB.")
    try:
        return json.loads(bytes(read))
    except (ValueError, RecursionError) as error:
        raise RunError(f"the request is not JSON ({error}).") from error


class _Work:
    """A request's job: its events as they come, and a line on stderr at its end."""

    def __init__(self, engine: Engine, asked: Asked, begin: float) -> None:
        self._engine = engine
        self._asked = asked
        self._begin = begin
        self.said: list[Said] = []

    async def events(self) -> AsyncGenerator[Event]:
        """What comes; leaving before the end cancels the job."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(arrived.put_nowait, event)

        job = Job(self._asked.asks, emit)
        self._engine.submit(job)
        how = "given up"
        try:
            while len(self.said) < len(self._asked.asks):
                event = await arrived.get()
                if isinstance(event, Said):
                    self.said.append(event)
                if isinstance(event, Failure):
                    how = f"refused: {event.message}"
                elif len(self.said) == len(self._asked.asks):
                    how = "done"
                yield event
                if isinstance(event, Failure):
                    return
        finally:
            job.cancelled.set()
            self._log(how)

    def _log(self, how: str) -> None:
        read = sum(len(ask.prompt) for ask in self._asked.asks[:: self._asked.n])
        written = sum(each.tokens for each in self.said)
        kind = "chat" if self._asked.chat else "completion"
        seconds = time.perf_counter() - self._begin
        _say(f"{kind}, {read:,} tokens and {written:,} new, {seconds:.1f} s: {how}")


async def _whole(request: Request, work: _Work, writer: Writer) -> Response:
    """The whole answer, unless the client goes away before."""

    def written() -> Response:
        # json.dumps would keep the event loop waiting from another thread too: it is one step.
        steps = json.JSONEncoder(allow_nan=False).iterencode(writer.whole(work.said))
        return Response("".join(steps), media_type="application/json")

    async def collected() -> Response:
        async with contextlib.aclosing(work.events()) as events:
            async for event in events:
                if isinstance(event, Failure):
                    return _refusal(event.status, event.message)
        return await asyncio.to_thread(written)

    answer, gone = asyncio.ensure_future(collected()), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=_GONE)
        return answer.result()
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _left(request: Request) -> None:
    """Return when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _streamed(work: _Work, writer: Writer) -> AsyncGenerator[str]:
    """Server-sent events; a failure is one too, since the status was sent before."""
    async with contextlib.aclosing(work.events()) as events:
        async for event in events:
            if isinstance(event, Failure):
                yield _sse([error_body(event.message, event.status)])
                return
            yield _sse(writer.pieces(event))
    yield _sse(writer.last(work.said)) + "data: [DONE]\n\n"


def _sse(values: Sequence[Any]) -> str:
    return "".join(f"data: {json.dumps(value)}\n\n" for value in values)


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(message, status), status_code=status)


async def _not_found(request: Request, error: Exception) -> Response:
    status = int(getattr(error, "status_code", 404))
    answer = _refusal(status, f"{request.method} {request.url.path} is not served here.")
    answer.headers.update(getattr(error, "headers", None) or {})  # which methods are, with a 405
    return answer


async def _broken(request: Request, error: Exception) -> Response:
    return _refusal(500, f"{type(error).__name__}: {error}")
