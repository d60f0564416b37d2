"""What clients of OpenAI's API send, read and checked: completions and chats.

Fields that this server cannot obey are refused by name unless they ask for nothing.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, structs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DataError, RunError, nearest
from ..generation.detokenize import text_of
from ..generation.requests import is_prompt, prompt_ids, reach
from ..prompts.rendering import render_chat
from ..schema import conform
from .engine import Ask, Drawn

__all__ = ["Asked", "Reader", "UnknownModelError"]

_NEW = 16
"""Tokens of a completion whose request does not say (as OpenAI and vLLM have it)."""
_UNBOUNDED = 1024
"""Tokens of a chat's answer whose request does not say, where the model reads any number."""
_IDLE: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields that are not obeyed, and what they may say because it changes nothing."""
_WIDEST = 64
"""Characters that a token may stand for at least: a vocabulary with shorter ones may join some."""
_CONTINUATIONS = 1024
"""Of one request at most."""
_Count = Annotated[int, Meta(ge=0, le=20)]
_Stop = Annotated[str, Meta(max_length=1024)]
"""Each is looked for after each token, while other requests wait."""


class UnknownModelError(RunError):
    """A request names another model than the one that is served."""


class _StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class _Request(Struct, forbid_unknown_fields=True, kw_only=True):
    """What completions and chats have in common."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=64)] = []
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    ignore_eos: bool = False
    stream: bool = False
    stream_options: _StreamOptions | None = None
    user: str | None = None
    metadata: Any = None


class _Completion(_Request, forbid_unknown_fields=True, kw_only=True):
    prompt: Any
    echo: bool = False
    logprobs: _Count | None = None
    prompt_logprobs: _Count | None = None


class _Chat(_Request, forbid_unknown_fields=True, kw_only=True):
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: _Count = 0
    chat_template_kwargs: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that can be answered."""

    asks: tuple[Ask, ...]
    """Its continuations: of each prompt in order, `n`."""
    n: int
    chat: bool
    stream: bool
    include_usage: bool = False
    """End a stream with the numbers of tokens."""
    echoed: tuple[str, ...] | None = None
    """What stands in front of each continuation: its prompt; None for nothing."""
    logprobs: int | None = None
    """Likeliest tokens to show for each token; None for no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, in vLLM's form."""


class Reader:
    """Reads requests for one model.

    Args:
        model: that is served.
        tokenizer: the model's; a copy is used, since threads that write text use it too.
        name: what requests call the model.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
    ) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._name = name
        self._most, self._what = reach(model)
        table: Any = model.get_input_embeddings()
        self._vocabulary = int(table.weight.shape[0])
        self._widest = max(_WIDEST, *map(len, tokenizer.get_vocab()))

    @property
    def window(self) -> int | None:
        """Tokens of a prompt and its continuation at most; None for any number."""
        return self._most

    def read(self, body: object, *, chat: bool) -> Asked:
        """Check a request and write its prompts in tokens.

        Args:
            body: what JSON gave.
            chat: whether it was sent to /v1/chat/completions.

        Raises:
            UnknownModelError: it names another model.
            RunError: a field that is unknown, missing, of another type or out of range.
            DataError: a prompt that is empty, or longer than the window with what is to follow.
        """
        if not isinstance(body, dict):
            raise RunError(f"the request is {str(body)[:40]!r}: expected a JSON object.")
        kind = _Chat if chat else _Completion
        given = _obeyed({str(key): value for key, value in body.items()}, kind)
        request: Any = conform(given, kind, "request", next_step="Mend the request.")
        if request.model not in (None, self._name):
            raise UnknownModelError(
                f"model {request.model!r:.60} is not served here: expected {self._name!r}."
            )
        return self._chat(request) if chat else self._completion(request)

    def _completion(self, request: _Completion) -> Asked:
        if any(_holds_messages(part) for part in _flat(request.prompt)):
            raise DataError("prompt: expected text or token ids; /v1/chat/completions takes chats.")
        prompts = 1 if is_prompt(request.prompt) else len(_flat(request.prompt))
        if prompts * request.n > _CONTINUATIONS:
            raise RunError(
                f"{prompts:,} prompts with n={request.n}: expected at most {_CONTINUATIONS:,} "
                "continuations in all: send several requests."
            )
        for part in _flat(request.prompt):
            self._refuse_huge(part)
        found = prompt_ids(self._tokenizer, _well_formed(request.prompt), self._vocabulary)
        scored = request.echo or request.prompt_logprobs is not None
        if request.stream and scored:
            raise RunError("stream with echo or prompt_logprobs: leave one of them out.")
        most = _NEW if request.max_tokens is None else request.max_tokens
        if not most and not scored:
            raise RunError("max_tokens=0: expected 1 or more, or echo, or prompt_logprobs.")
        shown = [request.prompt_logprobs, request.logprobs if request.echo else None]
        asks = self._asks(
            request,
            found,
            [most] * len(found),
            likeliest=request.logprobs,
            prompt_likeliest=max((n for n in shown if n is not None), default=None),
        )
        return Asked(
            asks,
            request.n,
            chat=False,
            stream=request.stream,
            include_usage=_usage(request),
            echoed=self._echoed(request, found) if request.echo else None,
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs,
        )

    def _echoed(self, request: _Completion, found: list[tuple[int, ...]]) -> tuple[str, ...]:
        """Prompts as they were sent, or the text of token ids, for each continuation."""
        sent = _flat(request.prompt)
        texts = sent if isinstance(sent[0], str) else [text_of(self._tokenizer, x) for x in found]
        return tuple(text for text in texts for _ in range(request.n))

    def _chat(self, request: _Chat) -> Asked:
        if not self._tokenizer.chat_template:
            raise DataError(
                "the model's tokenizer has no chat template: send text to /v1/completions."
            )
        messages = [_message(each, index) for index, each in enumerate(request.messages)]
        text = render_chat(
            self._tokenizer, messages, generation=True, variables=request.chat_template_kwargs
        )
        self._refuse_huge(text)
        ids: Any = self._tokenizer(_well_formed(text), add_special_tokens=False)["input_ids"]
        prompt = prompt_ids(self._tokenizer, [ids], self._vocabulary)
        most = request.max_completion_tokens
        most = request.max_tokens if most is None else most
        if most is None:
            most = _UNBOUNDED if self._most is None else max(1, self._most - len(prompt[0]))
        if not most:
            raise RunError("max_tokens=0: expected 1 or more.")
        if request.top_logprobs and not request.logprobs:
            raise RunError("top_logprobs without logprobs: set logprobs to true.")
        shown = request.top_logprobs if request.logprobs else None
        asks = self._asks(request, prompt, [most], likeliest=shown, prompt_likeliest=None)
        return Asked(
            asks,
            request.n,
            chat=True,
            stream=request.stream,
            include_usage=_usage(request),
            logprobs=shown,
        )

    def _asks(
        self,
        request: _Request,
        prompts: list[tuple[int, ...]],
        new: list[int],
        *,
        likeliest: int | None,
        prompt_likeliest: int | None,
    ) -> tuple[Ask, ...]:
        stop = [request.stop] if isinstance(request.stop, str) else request.stop
        stop = [_well_formed(each) for each in stop if each]
        seed = secrets.randbits(62) if request.seed is None else request.seed % (1 << 63)
        greedy = request.temperature == 0  # by which the likeliest is taken, whatever the rest says
        drawn = Drawn(
            temperature=request.temperature,
            top_k=0 if greedy else max(request.top_k, 0),
            top_p=1.0 if greedy else request.top_p,
            min_p=0.0 if greedy else request.min_p,
        )
        for prompt, most in zip(prompts, new, strict=True):
            self._refuse_long(prompt, most)
        return tuple(
            Ask(
                prompt,
                most,
                drawn,
                seed,
                choice=index * request.n + copy_of,
                stop=tuple(stop),
                ignore_eos=request.ignore_eos,
                continues=isinstance(request, _Completion),
                likeliest=likeliest,
                prompt_likeliest=prompt_likeliest,
            )
            for index, (prompt, most) in enumerate(zip(prompts, new, strict=True))
            for copy_of in range(request.n)
        )

    def _refuse_huge(self, text: Any) -> None:
        """Refuse a text that no splitting fits into the window, before it is split.

        That takes seconds a megabyte, in which no other request is read.
        """
        if self._most is None or not isinstance(text, str):
            return
        if len(text) > self._most * self._widest:
            raise DataError(
                f"the prompt has {len(text):,} characters, which no tokens of at most "
                f"{self._widest} characters fit into: {self._what} is {self._most:,}. Send a "
                "shorter one. Nothing is cut off."
            )

    def _refuse_long(self, prompt: tuple[int, ...], new: int) -> None:
        if self._most is not None and len(prompt) + new > self._most:
            shorter = f"send at most {self._most - new:,} tokens, or " if new < self._most else ""
            raise DataError(
                f"the prompt has {len(prompt):,} tokens and {new:,} are to follow, "
                f"{len(prompt) + new:,} in all, and {self._what} is {self._most:,}: {shorter}lower "
                "max_tokens. Nothing is cut off."
            )


def _obeyed(body: dict[str, Any], kind: type[Struct]) -> dict[str, Any]:
    """The fields that say something; null stands for a field that is left out.

    Raises:
        RunError: one that is unknown, or asks for what this server does not do.
    """
    known = [field.name for field in structs.fields(kind)]
    found: dict[str, Any] = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in known:
            found[name] = value
        elif name not in _IDLE:
            raise RunError(f"unknown field {name!r:.60}{nearest(name, known)}: leave it out.")
        elif value not in _IDLE[name]:
            raise RunError(
                f"{name}={value!r:.60}: this server does not do that, and does nothing else in its "
                "place: leave it out."
            )
    return found


def _usage(request: _Request) -> bool:
    return request.stream_options is not None and request.stream_options.include_usage


def _flat(prompt: Any) -> list[Any]:
    return prompt if isinstance(prompt, list) else [prompt]


def _holds_messages(part: Any) -> bool:
    """Whether this is a message of a chat, or a list with one."""
    return any(isinstance(each, Mapping) for each in _flat(part))


def _well_formed(value: Any) -> Any:
    """The same, once all text in it is known to be text that can be encoded.

    Raises:
        DataError: half of a character (a lone surrogate).
    """
    for text in _flat(value):
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"text that is not Unicode ({error.reason}): mend it.") from error
    return value


def _message(message: dict[str, Any], index: int) -> dict[str, Any]:
    """A message whose content is text; parts of text are joined."""
    content = message.get("content")
    if isinstance(content, list):
        parts: list[Any] = content
        kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
        if any(kind != "text" for kind in kinds):
            raise DataError(f"messages[{index}]: content of type {kinds!r:.60}: expected text.")
        texts = [part.get("text") for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"messages[{index}]: a part without a text as 'text'.")
        content = "".join(texts)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise DataError(f"messages[{index}]: expected a text as 'role' and as 'content'.")
    return {**message, "content": _well_formed(content)}
