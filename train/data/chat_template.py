r"""A conversation as the tokenizer's chat template writes it, and where the model speaks in it.

    template = chat_template(tokenizer)                   # its own; or "vicuna", or a Jinja file
    rendered = template.render(turns)
    rendered.text[slice(*rendered.spans[0])]              # "Paris.<|im_end|>\n"

A span runs from the end of the generation prompt to the end of the rendered turn: the difference of
two renderings, so that the template needs no `{% generation %}`. This holds only where a rendering
of the first turns begins the rendering of all. Templates that write an answer otherwise once
another follows it (Qwen3's, which drops earlier thoughts) raise `PrefixError`: with those, every
answer is rendered on its own by `render_last`, after what stood before it when it was given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.haystacks import bos_of
from longctx.prompts.rendering import render_chat

from .turns import Turn

__all__ = ["ChatTemplate", "PrefixError", "Rendered", "chat_template", "vicuna"]

_REASONING = ("reasoning_content", "reasoning", "thinking")  # transformers gives each for the other
_MARK = "\u241f"


class PrefixError(DataError):
    """A template that writes the first turns otherwise once others follow."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """First character and the one after the last of each answer, what ends it included."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a template puts around the contents, wherever that is always the same."""

    opening: tuple[str, ...]  # before the first question; with a system turn before and after it
    gap: str  # between a question and its answer
    lead: int  # how many of the gap's last characters the model writes itself
    between: str  # between an answer and the next question
    close: str  # after the last answer


class ChatTemplate:
    """A chat template together with the tokenizer that renders it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, name: str) -> None:
        self.source = source
        self.name = name
        self._tokenizer = tokenizer
        self._layouts: dict[bool, _Layout | None] = {}

    def render(self, turns: Sequence[Turn], variables: Mapping[str, Any] | None = None) -> Rendered:
        """Render tidied turns: an optional system turn, then questions and answers.

        Equals `render_by_prefixes`, in time linear in the conversation: what the template puts
        around contents is learnt once, by prefixes, and each text is compared with the rendering.

        Args:
            turns: what is said.
            variables: what else the template is given: tools, say.

        Raises:
            DataError: see `render_by_prefixes`.
        """
        system = turns[0].role == "system"
        in_turn = not variables and len(turns) % 2 == int(system)
        if in_turn and all(turn.role != "tool" and not turn.fields for turn in turns):
            if system not in self._layouts:
                self._layouts[system] = self._learn(system)
            layout = self._layouts[system]
            predicted = _lay_out(turns, layout) if layout else None
            if predicted and predicted.text == self._string(turns):
                return predicted
        return self.render_by_prefixes(turns, variables)

    def render_by_prefixes(
        self, turns: Sequence[Turn], variables: Mapping[str, Any] | None = None
    ) -> Rendered:
        """Render the turns before each answer, those with it, and all.

        Raises:
            PrefixError: the template does not preserve prefixes.
            DataError: the template refuses the turns, or fails.
        """
        text = self._string(turns, variables)
        spans: list[tuple[int, int]] = []
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = self._string(turns[:index], variables, generation=True)
            upto = self._string(turns[: index + 1], variables)
            if not (upto.startswith(prompt) and text.startswith(upto)):
                raise PrefixError(
                    f"the chat template of {self.name} does not preserve prefixes: up to turn "
                    f"{index + 1} of {len(turns)} it writes …{upto[-40:]!r}, with all turns "
                    f"…{text[max(0, len(upto) - 40) : len(upto)]!r}. Labels would fall on the "
                    "wrong tokens. Pass a template that does (--template vicuna, or a Jinja file)."
                )
            spans.append((len(prompt), len(upto)))
        return Rendered(text, tuple(spans))

    def render_last(
        self, turns: Sequence[Turn], variables: Mapping[str, Any] | None = None
    ) -> Rendered:
        """Render turns that end with an answer, with a span for this answer alone.

        Raises:
            DataError: the template refuses the turns, or does not begin the answer as it is served.
        """
        text = self._string(turns, variables)
        prompt = self._string(turns[:-1], variables, generation=True)
        if not text.startswith(prompt):
            raise DataError(
                f"the chat template of {self.name} does not write an answer as it is served: it "
                f"asks for one with …{prompt[-40:]!r} and writes "
                f"…{text[max(0, len(prompt) - 40) :][:80]!r}. Labels would fall on the wrong "
                "tokens. Pass a template that does (--template vicuna, or a Jinja file)."
            )
        return Rendered(text, ((len(prompt), len(text)),))

    def unused(
        self, turns: Sequence[Turn], variables: Mapping[str, Any], text: str
    ) -> Iterator[str]:
        """Which fields the template does not write: its text is the same without them.

        Yields names of turns' fields and of variables, "system" and "tool" for a turn of this role
        that is not written, and "call" for a call that is not written in a turn without a text.
        """
        names = dict.fromkeys(name for turn in turns for name in turn.extra)
        for name in names:
            fewer = [_without(turn, name) for turn in turns]
            if not self._reads(name) or self._safely(fewer, variables) == text:
                yield name
                calls = [turn for turn in turns if name in turn.extra and not turn.text.strip()]
                if name == "tool_calls" and calls:
                    yield "call"
        for name in variables:
            rest = {key: value for key, value in variables.items() if key != name}
            if not self._reads(name) or self._safely(turns, rest) == text:
                yield name
        for index, turn in enumerate(turns):
            if turn.role in ("system", "tool") and turn.text.strip() not in text:
                other = replace(turn, text=f"{_MARK}{turn.text}{_MARK}")
                if self._safely([*turns[:index], other, *turns[index + 1 :]], variables) == text:
                    yield turn.role

    def _reads(self, name: str) -> bool:
        """Whether the template names a field at all."""
        names = _REASONING if name in _REASONING else (name,)
        return re.search(rf"\b({'|'.join(map(re.escape, names))})\b", self.source) is not None

    def _safely(self, turns: Sequence[Turn], variables: Mapping[str, Any]) -> str | None:
        """The rendering; None where the template cannot do without what was left out."""
        try:
            return self._string(turns, variables)
        except DataError:
            return None

    def _string(
        self,
        turns: Sequence[Turn],
        variables: Mapping[str, Any] | None = None,
        *,
        generation: bool = False,
    ) -> str:
        messages = [turn.message for turn in turns]
        how: dict[str, Any] = {"source": self.source, "name": self.name, "generation": generation}
        try:
            return render_chat(self._tokenizer, messages, variables=variables, **how)
        except DataError:
            spelt = [_spelt(message) for message in messages]
            if spelt == messages:
                raise
            return render_chat(self._tokenizer, spelt, variables=variables, **how)

    def _learn(self, system: bool) -> _Layout | None:
        """Find the layout with marks for contents; None where it is not always the same."""
        roles = ["system"] * system + ["user", "assistant"] * 3
        turns = [Turn(cast(Any, role), f"{_MARK}{i}{_MARK}") for i, role in enumerate(roles)]
        try:
            rendered = self.render_by_prefixes(turns)
        except DataError:  # prefixes may yet hold for shorter conversations, without system turns
            return None
        pieces: list[str] = []
        rest, place, starts = rendered.text, 0, list[int]()
        for turn in turns:
            piece, found, rest = rest.partition(turn.text)
            if not found:
                return None
            pieces.append(piece)
            place += len(piece)
            starts.append(place)
            place += len(turn.text)
        first = int(system)
        gaps, betweens = set(pieces[first + 1 :: 2]), set(pieces[first + 2 :: 2])
        answers = zip(starts[first + 1 :: 2], rendered.spans, strict=True)
        leads = {start - span[0] for start, span in answers}
        if max(len(gaps), len(betweens), len(leads)) > 1:
            return None
        (gap,), (between,), (lead,) = gaps, betweens, leads
        if not between.startswith(rest) or not 0 <= lead <= len(gap):
            return None
        return _Layout(tuple(pieces[: first + 1]), gap, lead, between, rest)


def _without(turn: Turn, name: str) -> Turn:
    extra = {key: value for key, value in turn.extra.items() if key != name}
    return replace(turn, fields=json.dumps(extra, ensure_ascii=False) if extra else "")


def _spelt(message: Mapping[str, Any]) -> dict[str, Any]:
    """With the arguments of calls as JSON text, which some templates (DeepSeek's) ask for."""
    calls: Any = message.get("tool_calls")
    if not isinstance(calls, list):
        return dict(message)
    made: list[Any] = []
    for call in cast(list[Any], calls):
        inner = call.get("function", call)
        if isinstance(inner, Mapping) and isinstance(inner.get("arguments"), Mapping):
            inner = {**inner, "arguments": json.dumps(inner["arguments"], ensure_ascii=False)}
        made.append({**call, "function": inner} if "function" in call else inner)
    return {**message, "tool_calls": made}


def _lay_out(turns: Sequence[Turn], layout: _Layout) -> Rendered:
    """Write the turns as the layout says."""
    exchanges = (len(turns) - len(layout.opening) + 1) // 2
    inner = [layout.gap, layout.between] * exchanges
    parts: list[str] = []
    for piece, turn in zip([*layout.opening, *inner[:-1]], turns, strict=True):
        parts += [piece, turn.text]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part))
    content = [ends[2 * i + 1 : 2 * i + 3] for i in range(len(turns))]
    return Rendered(
        "".join([*parts, layout.close]),
        tuple(
            (start - layout.lead, end + len(layout.close))
            for turn, (start, end) in zip(turns, content, strict=True)
            if turn.role == "assistant"
        ),
    )


_VICUNA = (
    "{{% if messages[0]['role'] == 'system' %}}{{{{ {bos} + messages[0]['content'] + ' ' }}}}"
    "{{% else %}}{{{{ {bos} + 'A chat between a curious user and an artificial intelligence "
    "assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s "
    "questions. ' }}}}{{% endif %}}"
    "{{% for message in messages %}}"
    "{{% if message['role'] == 'user' %}}{{{{ 'USER: ' + message['content'] + ' ' }}}}"
    "{{% elif message['role'] == 'assistant' %}}"
    "{{{{ 'ASSISTANT: ' + message['content'] + eos_token }}}}{{% endif %}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ 'ASSISTANT:' }}}}{{% endif %}}"
)


def vicuna(tokenizer: PreTrainedTokenizerBase) -> str:
    """Vicuna v1.1's chat template, for base models; LongChat was trained with it.

    A BOS stands in front if the tokenizer puts one before every text. Give the trained model's
    tokenizer the same: `tokenizer.chat_template = vicuna(tokenizer)`.

    Source: github.com/lm-sys/FastChat, fastchat/conversation.py, "vicuna_v1.1".

    Raises:
        DataError: the tokenizer has no end token.
    """
    if tokenizer.eos_token is None:
        raise DataError("the tokenizer has no eos_token, which ends a Vicuna answer: set one.")
    return _VICUNA.format(bos="bos_token" if bos_of(tokenizer) else "''")


def chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> ChatTemplate:
    """Take the tokenizer's own template (None), "vicuna", or one from a Jinja file.

    Raises:
        DataError: the tokenizer has none of its own, or no file of that name is there.
    """
    name = str(tokenizer.name_or_path) or type(tokenizer).__name__
    if template is None:
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {name} has no chat template, as base models do: pass "
                'template="vicuna" (--template vicuna), or the path of a Jinja file.'
            )
        try:
            own = tokenizer.get_chat_template()
        except ValueError as error:  # several templates, none of them the default
            raise DataError(
                f"the tokenizer of {name} names no default among its chat templates: pass one of "
                "them as a Jinja file (--template)."
            ) from error
        return ChatTemplate(tokenizer, own, name)
    if template == "vicuna":
        return ChatTemplate(tokenizer, vicuna(tokenizer), template)
    if not Path(template).is_file():
        raise DataError(f"template={template!r}: expected 'vicuna' or the path of a Jinja file.")
    try:
        return ChatTemplate(tokenizer, Path(template).read_text(encoding="utf-8"), template)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"template={template!r} cannot be read ({error}): expected a Jinja file in UTF-8."
        ) from error
