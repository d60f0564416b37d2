"""What accelerate is told for sequence parallel, and what is missing; test_distributed runs it."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from longctx.errors import RunError
from longctx.train.config import Training
from longctx.train.parallel.before_transformers_5_23 import checkpointing_arguments
from longctx.train.parallel.fsdp import parallel_arguments
from longctx.train.parallel.ulysses import OLDEST, precision, ulysses_arguments


def _installed(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def found(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)


@pytest.mark.parametrize(("version", "there"), [(None, "none"), ("0.19.6", "0.19.6")])
def test_deepspeed_that_is_missing_or_old_is_named(
    version: str | None, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(monkeypatch, version)
    says = rf"{OLDEST} or later.* there is {there}: pip install 'longctx-toolkit\[sp\]'"
    with pytest.raises(RunError, match=says):
        ulysses_arguments(Training(sp=2), 2, "sdpa")


@pytest.mark.parametrize("processes", [1, 3, 5])
def test_processes_that_do_not_fit(processes: int) -> None:
    with pytest.raises(RunError, match=f"sp=2 takes 2 processes.* there is {processes}: torchrun"):
        ulysses_arguments(Training(sp=2), processes, "sdpa")


def test_what_accelerate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, OLDEST)
    told = parallel_arguments(Training(sp=2, gradient_checkpointing="layers"), 6, "sdpa")
    config = told["parallelism_config"]
    assert (config.sp_size, config.dp_replicate_size, config.dp_shard_size) == (2, 3, 1)
    assert config.sp_backend == "deepspeed"
    assert config.sp_handler.sp_attn_implementation == "sdpa"
    assert told["deepspeed"]["zero_optimization"]["stage"] == 1
    assert checkpointing_arguments(offload=False).items() <= told.items()


def test_the_extra_asks_for_what_is_refused_below() -> None:
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert extras["optional-dependencies"]["sp"] == [f"deepspeed>={OLDEST}"]


def test_weights_stay_float32_under_deepspeed_too() -> None:
    assert precision({"fsdp": True}, half=True) == {"fsdp": True, "bf16": True}
    alone = {"deepspeed": {"zero_optimization": {"stage": 1}}}
    assert precision(alone, half=False) == {**alone, "bf16": False}
    half = precision(alone, half=True)
    assert "bf16" not in half
    assert half["deepspeed"]["torch_autocast"]["dtype"] == "bfloat16"
    assert "torch_autocast" not in alone["deepspeed"]
