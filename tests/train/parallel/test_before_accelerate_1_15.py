"""Offloading under FSDP, with and without the setting, on whatever is installed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from longctx.errors import RunError
from longctx.train.parallel import before_accelerate_1_15 as older


@dataclass
class Older:
    """The plugin before it had the setting."""

    activation_checkpointing: bool = False


@dataclass
class Newer(Older):
    """The plugin with it."""

    activation_checkpointing_offload: bool = False


def test_offloading_is_asked_for_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(older, "FullyShardedDataParallelPlugin", Newer)
    assert older.offload_arguments(offload=True) == {"activation_checkpointing_offload": True}
    assert older.offload_arguments(offload=False) == {}
    monkeypatch.setattr(older, "FullyShardedDataParallelPlugin", Older)
    assert older.offload_arguments(offload=False) == {}
    with pytest.raises(RunError, match=r"needs accelerate 1\.15, here is \d"):
        older.offload_arguments(offload=True)
