"""What older releases call otherwise, with each of both names on whatever is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from longctx.errors import RunError
from longctx.train.parallel import before_transformers_5_23 as older


class Recorder(SimpleNamespace):
    """Takes a call of either name."""

    def activation_checkpointing_enable(self, settings: Any) -> None:
        self.called = ("activation", settings)

    def gradient_checkpointing_enable(self, settings: Any) -> None:
        self.called = ("gradient", settings)


@pytest.mark.parametrize(("renamed", "word"), [(True, "activation"), (False, "gradient")])
def test_checkpointing_has_the_name_of_the_release(
    renamed: bool, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(older, "_RENAMED", renamed)
    model: Any = Recorder()
    older.checkpoint_activations(model, {"use_reentrant": False})
    assert model.called == (word, {"use_reentrant": False})
    assert older.checkpointing_arguments(offload=False) == {
        f"{word}_checkpointing": True,
        f"{word}_checkpointing_kwargs": {"use_reentrant": False},
    }


def test_offloading_is_refused_where_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(older, "_RENAMED", True)
    settings = older.checkpointing_arguments(offload=True)["activation_checkpointing_kwargs"]
    assert settings["offload"]
    monkeypatch.setattr(older, "_RENAMED", False)
    with pytest.raises(RunError, match=r"needs transformers 5\.23, here is 5\."):
        older.checkpointing_arguments(offload=True)
