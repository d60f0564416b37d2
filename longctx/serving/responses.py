"""Answers in the form of OpenAI's API, whole or as pieces of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from .engine import Piece, Said, Scored
from .requests import Asked
from .token_texts import TokenTexts

__all__ = ["Writer", "error_body"]

_LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON does not have."""


def error_body(message: str, status: int) -> dict[str, Any]:
    """An error as clients of OpenAI's API read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


class Writer:
    """Writes the answer to one request.

    Args:
        asked: the request.
        texts: of the model's tokens.
        name: of the model.
    """

    def __init__(self, asked: Asked, texts: TokenTexts, name: str) -> None:
        self._asked = asked
        self._texts = texts
        self._head = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }
        self._begun: set[int] = set()  # continuations of a stream whose first piece was written
        self._offsets: dict[int, int] = {}  # characters of the tokens of each that were written

    def whole(self, said: Sequence[Said]) -> dict[str, Any]:
        """The whole answer."""
        kind = "chat.completion" if self._asked.chat else "text_completion"
        choices = [self._choice(each) for each in said]
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage(said)}

    def pieces(self, event: Piece | Said) -> list[dict[str, Any]]:
        """What a stream says of an event."""
        index = event.index
        found: list[dict[str, Any]] = []
        if self._asked.chat and index not in self._begun:
            found.append(self._chunk(index, {"role": "assistant", "content": ""}))
        self._begun.add(index)
        if isinstance(event, Said):
            found.append(self._chunk(index, {} if self._asked.chat else "", event.finish_reason))
            return found
        text = event.text
        begin = self._offsets.get(index, 0)  # text may be held back, and its tokens told already
        logprobs = self._logprobs(event.scores, begin)
        self._offsets[index] = begin + self._size([each.token for each in event.scores])
        delta: Any = {"content": text} if self._asked.chat else text
        found.append(self._chunk(index, delta, logprobs=logprobs))
        return found

    def last(self, said: Sequence[Said]) -> list[dict[str, Any]]:
        """What a stream ends with."""
        if not self._asked.include_usage:
            return []
        return [{**self._chunk(0, ""), "choices": [], "usage": self._usage(said)}]

    def _chunk(
        self, index: int, delta: Any, finish_reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        chat = self._asked.chat
        choice = {"index": index, "finish_reason": finish_reason, "logprobs": logprobs}
        choice |= {"delta": delta} if chat else {"text": delta}
        kind = "chat.completion.chunk" if chat else "text_completion"
        usage = {"usage": None} if self._asked.include_usage else {}
        return {**self._head, "object": kind, "choices": [choice], **usage}

    def _choice(self, said: Said) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": said.index, "finish_reason": said.finish_reason}
        if self._asked.chat:
            message = {"role": "assistant", "content": said.text}
            return {**choice, "message": message, "logprobs": self._logprobs(said.scores, 0)}
        ask = self._asked.asks[said.index]
        echoed = self._asked.echoed
        prompt = "" if echoed is None else echoed[said.index]
        choice |= {"text": prompt + said.text, "logprobs": None}
        if self._asked.logprobs is not None:
            before = () if echoed is None else (ask.prompt[0], *said.prompt_scores)
            # SentencePiece puts a space before the text, which nobody sent.
            first = len(prompt) - self._size(ask.prompt if before else ())
            choice["logprobs"] = self._listed((*before, *said.scores), min(first, 0))
        if self._asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = [None, *map(self._keyed, said.prompt_scores)]
        return choice

    def _usage(self, said: Sequence[Said]) -> dict[str, int]:
        read = sum(len(ask.prompt) for ask in self._asked.asks[:: self._asked.n])
        written = sum(each.tokens for each in said)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }

    def _logprobs(self, scores: Sequence[Scored], offset: int) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        if not self._asked.chat:
            return self._listed(scores, offset)
        return {
            "content": [
                {
                    **self._entry(each.token, each.log_p),
                    "top_logprobs": [
                        self._entry(*other) for other in each.likeliest[: self._asked.logprobs]
                    ],
                }
                for each in scores
            ]
        }

    def _listed(self, scores: Sequence[Scored | int], offset: int) -> dict[str, Any]:
        """Log-probabilities as completions have them; a bare token is one that nothing predicts.

        Special tokens have a text here, and take no room in the text that offsets count in.
        """
        tokens = [each if isinstance(each, int) else each.token for each in scores]
        sizes = [self._texts.size(token) for token in tokens]
        known = [None if isinstance(each, int) else each for each in scores]
        return {
            "tokens": [*map(self._texts.name, tokens)],
            "token_logprobs": [each and _finite(each.log_p) for each in known],
            "top_logprobs": [each and self._by_text(each) for each in known],
            "text_offset": [
                max(0, offset + before) for before in accumulate(sizes[:-1], initial=0)
            ][: len(sizes)],
        }

    def _by_text(self, scored: Scored) -> dict[str, float]:
        """The likeliest tokens by name, of two with one name the likelier, and the token."""
        found: dict[str, float] = {}
        for token, log_p in scored.likeliest[: self._asked.logprobs]:
            found.setdefault(self._texts.name(token), _finite(log_p))
        found.setdefault(self._texts.name(scored.token), _finite(scored.log_p))
        return found

    def _keyed(self, scored: Scored) -> dict[str, Any]:
        """The form of vLLM: by token id, the token itself always among them."""
        limit = self._asked.prompt_logprobs or 0
        found = {
            str(token): {
                "logprob": _finite(log_p),
                "rank": rank,
                "decoded_token": self._texts.text(token),
            }
            for rank, (token, log_p) in enumerate(scored.likeliest[:limit], 1)
        }
        found[str(scored.token)] = {
            "logprob": _finite(scored.log_p),
            "rank": scored.rank,
            "decoded_token": self._texts.text(scored.token),
        }
        return found

    def _entry(self, token: int, log_p: float) -> dict[str, Any]:
        own = self._texts.bytes_of(token)
        text = own.decode(errors="replace")
        return {"token": text, "logprob": _finite(log_p), "bytes": [*own]}

    def _size(self, tokens: Sequence[int]) -> int:
        return sum(map(self._texts.size, tokens))


def _finite(log_p: float) -> float:
    return max(_LEAST, log_p)
