"""Samples printed with what is learnt marked and in colour."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from longctx.train.data.preview import inspect_samples

from .. import chats


def shown(*said: str, colour: bool = False, **settings: Any) -> str:
    ids, labels = chats.by_hand(chats.tokenizer(), chats.turns(*said))
    out = io.StringIO()
    system = "standard" if colour else None
    console = Console(file=out, width=60, force_terminal=colour, color_system=system)
    row = {"input_ids": ids, "labels": labels, "record": 7}
    inspect_samples([row] * 5, chats.tokenizer(), console=console, **settings)
    return out.getvalue()


def test_what_is_learnt_stands_in_brackets() -> None:
    text = shown("Hi [bold]there[/]", "Hello!", "And?", "Fine.", count=1)
    header, *body = text.splitlines()
    assert header.startswith("sample 1 · record 7 · ")
    assert "\n".join(body).strip() == (
        "<|im_start|>user\nHi [bold]there[/]<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦Fine.<|im_end|>⟧"
    )


def test_colours_and_counts() -> None:
    text = shown("Hi", "Hello!", colour=True, count=2)
    assert "\x1b[1;32mHello!<|im_end|>" in text
    assert "sample 2 " in text
    assert "sample 3 " not in text


def test_long_stretches_say_what_is_missing() -> None:
    text = shown("grass " * 100, "Fine.", count=1, stretch=40)
    assert "characters…]" in text
    assert "grass " * 20 not in text.replace("\n", " ")
    whole = shown("grass " * 100, "Fine.", count=1, stretch=0)
    assert "characters…]" not in whole
    assert whole.replace("\n", " ").count("grass") == 100


def test_control_characters_do_not_reach_the_terminal() -> None:
    text = shown("Hi \x1b[2J\u202e\x9b", "Hello!\r\tthere", count=1)
    assert "Hi \\x1b[2J\\u202e\\x9b" in text
    assert "Hello!\\r\tthere" in text or "Hello!\\r" in text
