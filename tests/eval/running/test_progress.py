"""Where stderr is not a terminal, long work says now and then how far it is."""

from __future__ import annotations

import time

import pytest

from longctx.eval.running.progress import Progress


def test_lines_come_while_a_step_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(4.0, shown=True, every=0.02) as progress:
        progress.at("yarn:8 passkey 4096")
        progress.advance(1.0)
        time.sleep(0.2)
    shown = capsys.readouterr().err
    assert shown.count("25.0% at yarn:8 passkey 4096, 0:00:00 elapsed, about 0:00:0") > 1


@pytest.mark.parametrize(("shown", "every"), [(False, 0.01), (True, 30.0)])
def test_what_is_short_or_not_to_be_shown_says_nothing(
    shown: bool, every: float, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(1.0, shown=shown, every=every) as progress:
        time.sleep(0.05)
        progress.advance(1.0)
    assert capsys.readouterr().err == ""
