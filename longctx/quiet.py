"""Leaving out what transformers reports of things that longctx does on purpose."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["without_messages"]


@contextmanager
def without_messages(logger: str, *texts: str) -> Generator[None]:
    """Hold back what one logger says with one of these texts in it, inside the block."""

    def unreported(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in texts)

    found = logging.getLogger(logger)
    found.addFilter(unreported)
    try:
        yield
    finally:
        found.removeFilter(unreported)
