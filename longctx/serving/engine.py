"""One model that answers several requests: each with a cache of its own, a token of each in turn.

A request is generated alone, as `longctx.generate` does, so that nothing in it depends on the
others. Threads take turns at the model from token to token. Where a method's logits depend on the
length of the request, requests are answered one after the other instead, since what is being read
stands on the one rotary that they would share.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import DataError, LongctxError, ModelError, RunError
from ..generation.decoding import Call, Decoding, Sampling
from ..generation.decodings._sampled import Sampled
from ..generation.detokenize import TextStream
from ..generation.draws import seed_of
from ..generation.generate import ends_of, write_rows
from ..generation.rows import Row
from ..patch import methods_of
from ..scoring.batching import is_out_of_memory
from ..scoring.token_scores import score
from .stops import Stops

__all__ = ["Ask", "Drawn", "Engine", "Event", "Failure", "Job", "Piece", "Said", "Scored"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Drawn(Sampled):
    """How a request's tokens are drawn."""

    name: ClassVar[str] = "request"


@dataclass(frozen=True, slots=True)
class Ask:
    """One continuation that is asked for."""

    prompt: tuple[int, ...]
    max_tokens: int
    """New tokens at most; 0 scores the prompt alone."""
    drawn: Drawn
    seed: int
    """Of what it draws."""
    choice: int = 0
    """Which of several continuations that one seed gives."""
    stop: tuple[str, ...] = ()
    """Texts that end it, and are not part of it."""
    ignore_eos: bool = False
    continues: bool = False
    """Whether its text goes on in the prompt's, with a space in front where one belongs; a chat's
    answer begins anew."""
    likeliest: int | None = None
    """Give log-probabilities of the new tokens, and of so many likeliest ones; None for neither."""
    prompt_likeliest: int | None = None
    """The same of the prompt's tokens."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A token and how likely the model found it."""

    token: int
    log_p: float
    """Natural logarithm."""
    rank: int
    """Tokens at least as likely, itself included."""
    likeliest: tuple[tuple[int, float], ...]
    """Tokens with their log-probabilities, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of a continuation, which nothing that comes will change."""

    index: int
    """Of the continuation among those of a job."""
    text: str
    scores: tuple[Scored, ...] = ()


@dataclass(frozen=True, slots=True)
class Said:
    """A continuation that has ended."""

    index: int
    text: str
    tokens: int
    """How many were generated, without one that ends a text."""
    finish_reason: Literal["stop", "length"]
    scores: tuple[Scored, ...] = ()
    prompt_scores: tuple[Scored, ...] = ()
    """Of the prompt's second token and those after it; nothing predicts the first."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Nothing more comes: the last event of a job that could not be finished."""

    status: int
    """As HTTP names it: 400, 500 or 503."""
    message: str


_CLOSED = Failure(503, "the server is shutting down.")
Event: TypeAlias = Piece | Said | Failure


@dataclass(slots=True)
class Job:
    """What one request asks for, answered in its order."""

    asks: Sequence[Ask]
    emit: Callable[[Event], object]
    """Called from another thread with what there is; the last is a Failure or the last Said."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set it to end the job at its next token, or at the next layer of a forward pass; nothing is
    emitted after."""


class _CancelledError(Exception):
    """Ends a generation that nobody waits for any more."""


class Engine:
    """Answers jobs until it is closed.

    Args:
        model: in place, patched or not.
        tokenizer: the model's.
        parallel: jobs that are answered at once; others wait in the order they came. 1 where a
            method's logits depend on the length of the request.
        waiting: jobs that may wait.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        parallel: int = 4,
        waiting: int = 256,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.parallel = parallel if _alike(model) else 1
        self.ends = ends_of(model, tokenizer)
        self._turns = _Turns()
        self._jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self._full = Failure(503, f"{waiting} requests are waiting: try again later.")
        self._closed = threading.Event()
        self._answering = threading.local()
        self._hooks = [  # a long prompt is read in one pass, which can be ended between two layers
            layer.register_forward_pre_hook(self._before_layer)
            for layer in model.modules()
            if isinstance(layer, GradientCheckpointingLayer)
        ]
        self._threads = [
            threading.Thread(target=self._work, name=f"longctx-{index}", daemon=True)
            for index in range(self.parallel)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; a full queue or a closed engine is told as a Failure."""
        if (failure := self.unavailable()) is not None:
            job.emit(failure)
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            job.emit(self._full)

    def unavailable(self) -> Failure | None:
        """Why no job is taken now; None where one is."""
        if self._closed.is_set():
            return _CLOSED
        if self._jobs.full():
            self._drop_cancelled()
        return self._full if self._jobs.full() else None

    def _drop_cancelled(self) -> None:
        """Free the places of jobs that nobody waits for any more."""
        with self._jobs.mutex:
            waiting = [*self._jobs.queue]
            self._jobs.queue.clear()
            self._jobs.queue.extend(
                job for job in waiting if job is None or not job.cancelled.is_set()
            )
            self._jobs.not_full.notify_all()

    def close(self) -> None:
        """End what runs at its next token or layer, and refuse what waits."""
        self._closed.set()

    def join(self, seconds: float) -> bool:
        """Wait so many seconds for the threads to end after `close`; whether they have."""
        end = time.monotonic() + seconds
        for _ in self._threads:
            with suppress(queue.Full):  # jobs that wait are refused meanwhile, which makes room
                self._jobs.put(None, timeout=max(0.0, end - time.monotonic()))
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        for hook in self._hooks:
            hook.remove()
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._closed.is_set():
                job.emit(_CLOSED)
            elif not job.cancelled.is_set():
                self._answer(job)

    def _answer(self, job: Job) -> None:
        try:
            self._answering.job = job
            with self._turns.turn():
                scored: tuple[Scored, ...] = ()
                for index, ask in enumerate(job.asks):
                    if not index or ask.prompt != job.asks[index - 1].prompt:
                        scored = self._scored(ask)  # once for all continuations of a prompt
                    said = self._say(job, index, ask, scored)
                    if not job.cancelled.is_set():
                        job.emit(said)
        except _CancelledError:
            if not job.cancelled.is_set():
                job.emit(_CLOSED)
        except (DataError, RunError) as error:
            job.emit(Failure(400, str(error)))
        except LongctxError as error:
            job.emit(Failure(500, str(error)))
        except Exception as error:
            if is_out_of_memory(error):
                message = "memory ran out: send a shorter prompt, or fewer requests at once."
                job.emit(Failure(503, message))
            else:
                _log.exception("a request failed")
                job.emit(Failure(500, f"{type(error).__name__}: {error}"))

    def _say(self, job: Job, index: int, ask: Ask, scored: tuple[Scored, ...]) -> Said:
        self._pause(job)
        if not ask.max_tokens:
            return Said(index, "", 0, "length", prompt_scores=scored)
        row = Row(
            index,
            ask.prompt,
            ask.max_tokens,
            frozenset() if ask.ignore_eos else self.ends,
            None,
            seed_of(ask.seed, ask.choice),
        )
        tap = _Tap(row, ask.likeliest, lambda: self._pause(job))
        stops = Stops(ask.stop)

        def show(text: str) -> None:
            piece = stops.add(text)
            if stops.found:
                row.finish = "eos"
            if piece and not job.cancelled.is_set():
                job.emit(Piece(index, piece, tap.new()))

        behind = ask.prompt if ask.continues else ()
        row.stream = TextStream(self.tokenizer, show, behind=behind)
        write_rows(self.model, self.tokenizer, [row], _Tapped(ask.drawn, tap))
        rest, scores = stops.rest(), tap.new()
        if rest or scores:  # tokens of a stop have no text
            job.emit(Piece(index, rest, scores))
        reason = "stop" if stops.found or row.finish == "eos" else "length"
        return Said(index, stops.text, len(row.tokens), reason, tap.scores, scored)

    def _pause(self, job: Job) -> None:
        """Between two tokens: let others have their turn, and see whether to go on."""
        self._end_unwanted(job)
        self._turns.give_way()

    def _before_layer(self, *_: object) -> None:
        job = getattr(self._answering, "job", None)
        if job is not None:  # none in a thread that is not the engine's
            self._end_unwanted(job)

    def _end_unwanted(self, job: Job) -> None:
        if job.cancelled.is_set() or self._closed.is_set():
            raise _CancelledError

    def _scored(self, ask: Ask) -> tuple[Scored, ...]:
        """The scores of a prompt's tokens from the second on, read in one pass, if asked for."""
        prompt, likeliest = ask.prompt, ask.prompt_likeliest
        if likeliest is None or len(prompt) < 2:
            return ()
        found = score(self.model, torch.tensor([prompt]), likeliest=max(1, likeliest))
        top = found.likeliest
        assert top is not None
        if not bool(found.nll.isfinite().all()):
            raise ModelError(
                f"the model's logits of a prompt of {len(prompt):,} tokens are NaN or infinite: "
                "load it in another precision (--dtype float32)."
            )
        rows = zip(
            prompt[1:],
            found.nll[0].tolist(),
            top.rank[0].tolist(),
            top.ids[0, :, :likeliest].tolist(),
            top.nll[0, :, :likeliest].tolist(),
            strict=True,
        )
        return tuple(
            Scored(token, -nll, rank, tuple((i, -x) for i, x in zip(ids, nlls, strict=True)))
            for token, nll, rank, ids, nlls in rows
        )


def _alike(model: PreTrainedModel) -> bool:
    """Whether a token's logits are the same however long the request becomes."""
    return all(method.length_invariant for method in methods_of(model))


class _Tapped(Decoding):
    """Tokens drawn as a request says, and looked at as they come."""

    name: ClassVar[str] = "request"

    def __init__(self, drawn: Drawn, tap: _Tap) -> None:
        self._drawn = drawn
        self._tap = tap

    @property
    def sampling(self) -> Sampling:
        """What the request says."""
        return self._drawn.sampling

    def processors(self, call: Call) -> Sequence[LogitsProcessor]:
        """The one that looks."""
        del call
        return (self._tap,)


class _Tap(LogitsProcessor):
    """Sees the model's own logits of each new token, which it leaves as they are.

    Args:
        row: whose tokens they are.
        likeliest: as in `Ask`.
        pause: called before each token is taken.
    """

    def __init__(self, row: Row, likeliest: int | None, pause: Callable[[], None]) -> None:
        self._row = row
        self._likeliest = likeliest
        self._pause = pause
        self._log_p: Tensor | None = None
        self._found: list[Scored] = []
        self._given = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The logits [1, V] as they are."""
        self._collect()
        self._pause()
        if self._likeliest is not None:
            self._log_p = scores[0].float().log_softmax(-1)
        return scores

    @property
    def scores(self) -> tuple[Scored, ...]:
        """Of all tokens so far."""
        self._collect()
        return tuple(self._found)

    def new(self) -> tuple[Scored, ...]:
        """Those that were not given yet."""
        first, self._given = self._given, len(self.scores)
        return self.scores[first:]

    def _collect(self) -> None:
        """Keep the score of the token that was taken last."""
        if self._log_p is None or len(self._found) >= len(self._row.tokens):
            return
        token = self._row.tokens[-1]
        own = self._log_p[token]
        values, ids = self._log_p.topk(min(self._likeliest or 0, len(self._log_p)))
        top = zip(ids.tolist(), values.tolist(), strict=True)
        rank = int((self._log_p >= own).sum())
        self._found.append(Scored(token, float(own), rank, tuple(top)))


class _Turns:
    """A lock that is passed on in the order it was asked for."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._waiting: deque[object] = deque()
        self._taken = False

    @contextmanager
    def turn(self) -> Generator[None]:
        """Hold it inside the block."""
        self._take()
        try:
            yield
        finally:
            self._release()

    def give_way(self) -> None:
        """Let those who wait have it once each."""
        if self._waiting:
            self._release()
            self._take()

    def _take(self) -> None:
        me = object()
        with self._change:
            self._waiting.append(me)
            self._change.wait_for(lambda: not self._taken and self._waiting[0] is me)
            self._waiting.popleft()
            self._taken = True

    def _release(self) -> None:
        with self._change:
            self._taken = False
            self._change.notify_all()
