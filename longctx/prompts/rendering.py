r"""Chat templates rendered within bounds: limited time, memory and text, and always the same day.

    text = render_chat(tokenizer, [{"role": "user", "content": "Hi"}], generation=True)

A template is a program that came with a checkpoint. Whatever it does wrong is one `DataError`: it
raises, recurses, writes without end, or takes longer than ten seconds or more than 2 GiB. Time is
bounded on Linux, and memory in the main thread of a process there.

A template that writes today's date (`strftime_now`) is given 26 July 2024 instead, the date that
Llama 3's template writes where it knows no other: prompts are the same tomorrow.
"""

from __future__ import annotations

import ctypes
import datetime
import re
import signal
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from ..errors import DataError

__all__ = ["DATE", "EndlessTemplateError", "dated", "render_chat", "templates"]

DATE = datetime.datetime(2024, 7, 26, 12)
"""What stands for every day."""
SECONDS = 10.0
"""Most CPU time of one rendering."""
MEMORY = 1 << 31
"""Most bytes that one rendering may take beyond what the process holds."""
_ROOM = 1 << 24  # characters that a template may write beyond sixteen times its input
_DIRECTIVES = "aAbBcdDeFGHIjklmMpPrRsSTuUVwWxXyYzZ"


class EndlessTemplateError(DataError):
    """A template that is not done in time: to try it on another record would take as long."""


def dated(source: str) -> str:
    """The template with its date fixed to `DATE`; the same text where it asks for none.

    >>> dated("{{ messages }}")
    '{{ messages }}'
    """
    if "strftime_now" not in source:
        return source
    # Jinja strips spaces before a block at the beginning of a line, where it no longer stands.
    return _macro() + re.sub(r"^[ \t]+(?=\{%(?!\+)|\{#)", "", source)


def templates(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer's chat template, or several by name, as prompts are rendered with them."""
    own: Any = tokenizer.chat_template
    if isinstance(own, Mapping):
        return {name: dated(source) for name, source in own.items()}
    return dated(own) if isinstance(own, str) else own


@lru_cache
def _macro() -> str:
    """A Jinja macro that formats `DATE`: transformers passes no functions to a template."""
    table = [("%%", "\u241f")]
    for letter in _DIRECTIVES:
        written = DATE.strftime(f"%{letter}")
        table.append((f"%{letter}", written))
        table.append((f"%-{letter}", written.lstrip("0 ") or "0"))
    filters = "".join(f" | replace({old!r}, {new!r})" for old, new in [*table, ("\u241f", "%")])
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}{{ '' }}"


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    source: str | None = None,
    name: str = "",
    generation: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render messages.

    Args:
        tokenizer: whose special tokens the template writes.
        messages: dicts of role, content and whatever else the template reads.
        source: the template; None takes the tokenizer's own.
        name: what messages call the template's owner.
        generation: end with what begins an answer.
        variables: what else the template reads, `tools` above all.

    Raises:
        DataError: the template is not one, raises, or takes too much time, memory or text.
    """
    name = name or str(tokenizer.name_or_path) or type(tokenizer).__name__
    source = tokenizer.get_chat_template() if source is None else source
    way_out = "pass another template (--template vicuna, or a Jinja file)"
    try:
        with _limited():
            text: Any = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=dated(source),
                tokenize=False,
                add_generation_prompt=generation,
                **(variables or {}),
            )
    except TemplateSyntaxError as error:
        raise DataError(
            f"{name} is not a chat template: {error} (line {error.lineno}). Mend it, or {way_out}."
        ) from error
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages[:6])
        raise DataError(
            f"the chat template of {name} refuses the roles {roles}…: {error}. Leave such turns "
            f"out, or {way_out}."
        ) from error
    except _TooLongError as error:
        raise EndlessTemplateError(
            f"the chat template of {name} is not done after {SECONDS:.0f} seconds: mend it, or "
            f"{way_out}."
        ) from error
    except Exception as error:  # a template is a program, and can fail in any way
        said = f"{type(error).__name__}: {error}"
        raise DataError(
            f"the chat template of {name} fails with {said:.200}. Mend it, or {way_out}."
        ) from error
    most = _ROOM + 16 * sum(len(str(message.get("content"))) for message in messages)
    if not isinstance(text, str) or len(text) > most:
        raise DataError(
            f"the chat template of {name} writes {len(str(text)):,} characters for {len(messages)} "
            f"messages, and at most {most:,} are taken: mend it, or {way_out}."
        )
    return text


class _TooLongError(BaseException):
    """Ends a rendering; no `except Exception` on the way holds it up."""


@contextmanager
def _limited() -> Generator[None]:
    """Raise `_TooLongError` in the block after `SECONDS` of CPU time, MemoryError at `MEMORY`."""
    if not sys.platform.startswith("linux"):
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        with _watched():
            yield
        return
    import resource

    def stop(*_: Any) -> None:
        raise _TooLongError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as figures:
        held = int(figures.read().split()[0]) * resource.getpagesize()
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    before = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (min([held + MEMORY, *limits]), hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _watched() -> Generator[None]:
    """The same for the time of a thread that gets no signals; a limit of memory would be all's."""
    me, ended, change = threading.get_ident(), threading.Event(), threading.Lock()
    clock = time.pthread_getcpuclockid(me)
    end = time.clock_gettime(clock) + SECONDS

    def watch() -> None:
        while not ended.wait(max(0.01, end - time.clock_gettime(clock))):
            with change:
                if not ended.is_set() and time.clock_gettime(clock) >= end:
                    _raise_in(me, _TooLongError)
                    return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        with change:
            ended.set()
        _raise_in(me, None)  # what was to be raised and was not yet is not raised behind the block


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Have a thread raise an error before its next step; None takes that back."""
    given = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), given)
