"""The account of a source, in words."""

from __future__ import annotations

from typing import Any

from longctx.train.data.conversations import REASONS
from longctx.train.data.data_report import COUNTS, DataReport


def test_the_account_names_what_was_kept_and_what_was_not() -> None:
    counts = dict.fromkeys(COUNTS, 0)
    counts |= {"conversations": 1200, "samples": 1300, "tokens": 90_000, "kept": 85_000}
    counts |= {"supervised": 17_000, "dropped": 6_000, "too_long": 4, "leading": 77, "untaught": 3}
    report = DataReport("chats.json", 16_384, **counts, notes=("salvaged 9 whole records",))
    assert report.repeated == 1_000
    text = str(report)
    assert "1,200 conversations → 1,300 samples of up to 16,384 tokens" in text
    assert "85,000 kept, 6,000 dropped for length, 17,000 supervised (20% of those kept)" in text
    assert "1,000 in more than one sample" in text
    assert "4 exchanges left out, too long on their own" in text
    assert "3, no answered question" in text
    assert "77 × an answer before any question" in text
    assert text.endswith("salvaged 9 whole records")


def test_silence_about_what_did_not_happen() -> None:
    counts: Any = dict.fromkeys(COUNTS, 0)
    counts |= {"conversations": 1, "samples": 1, "tokens": 5, "kept": 5}
    assert len(str(DataReport("a", 8, **counts)).splitlines()) == 2


def test_every_reason_is_counted() -> None:
    assert set(REASONS) <= set(COUNTS)
