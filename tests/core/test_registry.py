"""Finding methods by name: what a file lacks, and values that a class cannot take."""

from __future__ import annotations

from pathlib import Path

import pytest

import longctx
from longctx.errors import MethodError
from longctx.registry import (
    make_method,
    method_class,
    parse_conversion,
    parse_method,
    parse_methods,
    split_methods,
)

from ..families import build
from ..shipping import shipped

FILE = """
from dataclasses import dataclass
from typing import ClassVar

from longctx.rope import Frequencies, Rope
from longctx.patches._frequency import FrequencyMethod


@dataclass(frozen=True, slots=True)
class Cut(FrequencyMethod):
    share: float = 0.5

    name: ClassVar[str] = "cut"
    needs_extent: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super(Cut, self).__post_init__()
        if self.share > 1:
            raise ValueError("a share is at most 1")

    def frequencies(self, rope: Rope) -> Frequencies:
        return Frequencies(rope.inv_freq()[:-1])
"""


def test_a_file_without_a_method_is_named(tmp_path: Path) -> None:
    with shipped(tmp_path, "cut", FILE), pytest.raises(MethodError, match=r"cut\.py has no METHOD"):
        method_class("cut")


def test_a_name_other_than_the_file_s_is_refused(tmp_path: Path) -> None:
    text = f"{FILE}\n\nMETHOD = Cut\n"
    with (
        shipped(tmp_path, "carve", text),
        pytest.raises(MethodError, match=r"Cut\.name is 'cut' in carve\.py: expected 'carve'"),
    ):
        method_class("carve")


def test_what_a_class_cannot_take_is_one_error(tmp_path: Path) -> None:
    with shipped(tmp_path, "cut", f"{FILE}\n\nMETHOD = Cut\n"):
        for text in ("cut:share=half", "cut:share=2"):
            with pytest.raises(MethodError, match=r"cut: share=.* cannot be used"):
                parse_method(text)
        assert make_method("cut", {}) == method_class("cut")()
        with pytest.raises(MethodError, match=r"shape \[7\], the model's rotary has \[8\]"):
            longctx.extend(build("llama"), "cut")


def test_methods_on_top_of_each_other_are_one_word() -> None:
    yarn, dual = parse_methods("yarn:2+dual_chunk:factor=4,log_n=True")
    assert (yarn.name, dual.name) == ("yarn", "dual_chunk")
    assert parse_methods("yarn:2 + log_n") == (parse_method("yarn:2"), parse_method("log_n"))
    assert parse_methods("abf:theta=1e+6") == (parse_method("abf:theta=1e6"),)
    assert parse_methods("none") == ()
    with pytest.raises(MethodError, match="names 2 methods"):
        parse_method("yarn:2+log_n")
    assert split_methods("longrope:@a+b/c+d.json+log_n") == ["longrope:@a+b/c+d.json", "log_n"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yarn:2+none", r"'none' in 'yarn:2\+none': expected a method"),
        ("yarn:2+", r"'' in 'yarn:2\+': expected a method"),
        ("+log_n", r"'' in '\+log_n': expected a method"),
        (
            "yarn:2+Log_N",
            r"'Log_N' in 'yarn:2\+Log_N': unknown method 'Log_N'; did you mean 'log_n'",
        ),
        ("yarn:half+log_n", r"'yarn:half' in 'yarn:half\+log_n': yarn: factor='half'"),
        ("yarn:2+moe", r"'moe' in 'yarn:2\+moe': moe makes a new model"),
        ("yarn:2+log_n+ntk:2", r"'ntk:2' in .*: yarn holds the rotary slot already"),
        (
            "rerope+yarn:2",
            r"'yarn:2' in .*: rerope counts on .*: write yarn before it",
        ),
    ],
)
def test_the_wrong_one_of_several_methods_is_named(text: str, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        parse_methods(text)


def test_conversions_are_made_one_after_the_other() -> None:
    with pytest.raises(MethodError, match="convert by one, then convert or extend"):
        parse_conversion("multi_query:1+yarn:2")
