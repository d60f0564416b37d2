"""A test that needs an optional package which is not installed is skipped with its name."""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest

OPTIONAL = (
    "datasets", "gguf", "hypothesis", "openai", "peft", "playwright", "starlette", "trl", "uvicorn",
)  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that imports one is skipped as a whole."""
    report = yield
    named = re.search(r"No module named '(\w+)", str(report.longrepr)) if report.failed else None
    if named is not None and named[1] in OPTIONAL:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {_reason(named[1])}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """A test in which one is imported on the way is skipped alone."""
    del item
    try:
        return (yield)
    except Exception as error:
        name = _missing(error)
        if name is None:
            raise
        pytest.skip(_reason(name))


def _missing(error: BaseException | None) -> str | None:
    """The optional package whose absence an error comes from."""
    while error is not None:
        name = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
        if name in OPTIONAL:
            return name
        error = error.__cause__ or error.__context__
    return None


def _reason(name: str) -> str:
    return f"pip install {name}"
