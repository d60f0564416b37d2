"""Chat templates that write the date, and those that would never end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from longctx.errors import DataError
from longctx.prompts import SHORT, Grass, passkey, rendering
from longctx.prompts.rendering import DATE, EndlessTemplateError, dated, render_chat

from ...train import chats

SAID = [{"role": "user", "content": "Hi"}]


def rendered(source: str, **settings: Any) -> str:
    return render_chat(chats.tokenizer(), SAID, source=source, **settings)


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d", "%H:%M:%S", "%%d", "%j %y"])
def test_the_date_is_written_as_python_would_write_it(form: str) -> None:
    source = f"It is {{{{ strftime_now({form!r}) }}}}: {{{{ messages[0].content }}}}"
    assert rendered(source) == f"It is {DATE.strftime(form)}: Hi"


@pytest.mark.parametrize(
    "start", ["  {% if true %}x{% endif %}", "\n x", "{#- c -#} x", "\t{# c #}x"]
)
def test_nothing_else_of_a_dated_template_changes(start: str) -> None:
    end = "{% if strftime_now is defined %}y{% endif %}"
    assert dated(start) == start
    assert rendered(start + end) == rendered(start) + "y"


def test_prompts_are_the_same_tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{{ strftime_now('%f%S') }}{{ messages[0].content }}"
    tokenizer = chats.tokenizer(source)
    one, two = (
        passkey(tokenizer, 200, depth=0.5, seed=1, haystack=Grass(), wording=SHORT)
        for _ in range(2)
    )
    assert one.input_ids == two.input_ids


def test_a_template_that_draws_lots_is_refused_for_prompts() -> None:
    tokenizer = chats.tokenizer("{{ range(100000) | random }}{{ messages[0].content }}")
    with pytest.raises(DataError, match="something else each time"):
        passkey(tokenizer, 200, depth=0.5, seed=1, haystack=Grass(), wording=SHORT)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for", "is not a chat template.*line 1"),
        ("{{ raise_exception('no\x1b[2J') }}", r"refuses the roles user…: no\\x1b\[2J"),
        ("{{ 1 / 0 }}", "fails with ZeroDivisionError"),
        ("{{ none + 1 }}", "fails with TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails with RecursionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails with OverflowError"),
        ("{{ 'a' * 10**8 }}", "writes 100,000,000 characters for 1 messages"),
        ("{{ 'a' * 10**13 }}", "fails with MemoryError"),
    ],
)
def test_whatever_a_template_does_is_one_error(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rendered(source)


def test_an_endless_template_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    loop = "{% for i in range(99999) %}"
    with pytest.raises(EndlessTemplateError, match="not done after"):
        rendered(f"{loop}{loop}{{% endfor %}}{{% endfor %}}")
    assert rendered("{{ messages[0].content }}") == "Hi"  # the timer is off again


def test_an_endless_template_is_stopped_in_a_thread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    loop = "{% for i in range(9999) %}"
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(rendered, f"{loop * 2}{'{% endfor %}' * 2}")
        with pytest.raises(EndlessTemplateError, match="not done after"):
            endless.result(60)
        assert pool.submit(rendered, "{{ messages[0].content }}").result() == "Hi"
