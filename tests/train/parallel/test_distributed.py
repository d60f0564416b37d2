"""Two processes learn what one learns: DDP, FSDP2, ring attention, Ulysses; and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import longctx
from longctx.errors import RunError
from longctx.train.config import Training
from longctx.train.engine.finetune import finetune
from longctx.train.loss.objective import Contrastive, Losses

from ..engine.test_finetune import Noise, counting, loaded, train, weights
from .distributed import CASES, Case

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, slots=True)
class Pair:
    """A case in several processes and in one."""

    case: Case
    two: Path
    one: Path

    def logged(self, name: str) -> tuple[list[float], list[float]]:
        """A figure of every update."""
        return _logged(self.two, name), _logged(self.one, name)

    @property
    def processes(self) -> list[dict[str, Any]]:
        """What each of the several saw of itself."""
        ranks = range(self.case.processes)
        return [torch.load(self.two.with_suffix(f".{rank}.pt")) for rank in ranks]

    @property
    def apart(self) -> float:
        """Largest difference of a weight between both saved models."""
        two, one = weights(self.two / "model"), weights(self.one / "model")
        assert two.keys() == one.keys()
        return max(float((two[name] - one[name]).abs().max()) for name in one)

    @property
    def moved(self) -> float:
        """Largest change of a weight by training."""
        before = loaded()[0].state_dict()
        one = weights(self.one / "model")
        return max(float((one[name] - before[name]).abs().max()) for name in one)


def _logged(path: Path, name: str) -> list[float]:
    lines = (json.loads(line) for line in (path / "log.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line and ("loss" in line or "eval_" in name)]


def start(folder: Path, *names: str) -> None:
    """Run cases in several processes, two unless they say otherwise."""
    processes = str(CASES[names[0]].processes if names[0] in CASES else 2)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += ["-m", "tests.train.parallel.distributed", str(folder), *names]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:]


def pair(folder: Path, name: str) -> Pair:
    """Run a case in one process, beside the several that are done; alike ones are run once."""
    case, two = CASES[name], folder / name
    rows = case.rows * case.training.batch_size
    alone = replace(case.training, dp_shard=1, cp=1, sp=1, batch_size=rows)
    settings = repr((alone, case.packed, case.positions, case.lora, case.untied, case.kinds))
    one = folder / f"one-{zlib.crc32(settings.encode())}"
    if not one.exists():
        case.train(one, alone)
    return Pair(case, two, one)


Runs = Callable[[str], Pair]
QUICK = ["ddp", "fsdp", "fsdp-sgd", "cp-pose"]
EXCHANGED = ["sp", "sp-sgd", "sp-pose", "sp-pose-sgd"]
_FEW = [name for name in CASES if name not in (*QUICK, *EXCHANGED)]
FOUR = [name for name in _FEW if name.startswith("four") and CASES[name].training.sp == 1]
SLOW = [name for name in _FEW if not name.startswith("four") and CASES[name].training.sp == 1]
# After sequence parallel, in the same processes, one that has nothing to do with it.
SLOW_EXCHANGED = [name for name in _FEW if name.startswith("sp-")] + ["ddp-sgd"]
FOUR_EXCHANGED = [name for name in _FEW if name.startswith("four-sp")]

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="pip install 'longctx-toolkit[sp]'"
)


def _runs(factory: pytest.TempPathFactory, names: list[str]) -> Runs:
    folder = factory.mktemp("runs")
    start(folder, *names)
    return lambda name: pair(folder, name)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return _runs(tmp_path_factory, QUICK)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return _runs(tmp_path_factory, SLOW)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return _runs(tmp_path_factory, FOUR)


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return _runs(tmp_path_factory, EXCHANGED)


@pytest.fixture(scope="module")
def slow_exchanged(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return _runs(tmp_path_factory, SLOW_EXCHANGED)


@pytest.fixture(scope="module")
def four_exchanged(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return _runs(tmp_path_factory, FOUR_EXCHANGED)


def _same(runs: Pair) -> None:
    """Losses, gradients and tokens of one process, and weights shared as was asked for."""
    two, one = runs.logged("loss")
    assert len(one) == 5
    assert two == pytest.approx(one, abs=1e-5)
    two, one = runs.logged("grad_norm")
    assert two == pytest.approx(one, rel=1e-4)
    two, one = runs.logged("tokens")
    assert two == one
    training = runs.case.training
    shared = training.dp_shard * training.cp
    through = 5 * training.gradient_accumulation_steps * 4  # of 4 layers
    passes = through if training.cp > 1 else 0
    # Queries, keys, values and what comes of them; interrupted runs repeat themselves.
    exchanges = through * 4 * (2 if training.gradient_checkpointing == "layers" else 1)
    exchanges *= training.sp > 1
    for rank, seen in enumerate(runs.processes):
        assert seen["losses"] == runs.processes[0]["losses"]
        assert seen["held"] == (0 if shared == 1 else pytest.approx(1 / shared, abs=0.01))
        assert set(seen["devices"]) == {"meta" if rank and shared > 1 else "cpu"}
        assert seen["calls"][:2] == [passes, passes]
        assert runs.case.interrupted or seen["calls"][2] == exchanges
        assert not seen["left"]
        assert seen["whole"]


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_learn_what_one_learns(quick: Runs, name: str) -> None:
    runs = quick(name)
    _same(runs)
    assert runs.moved > 1e-3
    assert runs.apart < 1e-5


@needs_deepspeed
@pytest.mark.parametrize("name", EXCHANGED)
def test_two_processes_that_exchange_heads_learn_what_one_learns(
    exchanged: Runs, name: str
) -> None:
    runs = exchanged(name)
    _same(runs)
    assert runs.moved > 1e-3
    assert runs.apart < 1e-5


def test_the_first_process_measures_for_all(quick: Runs) -> None:
    for seen in quick("ddp").processes:
        assert [figures["rank"] for figures in seen["figures"]] == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_rest_of_what_runs_in_two_processes(slow: Runs, name: str) -> None:
    """Layers run again, accumulation, adapters, shares of the loss, runs that were interrupted."""
    runs = slow(name)
    _same(runs)
    assert runs.apart < 1e-5


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", SLOW_EXCHANGED)
def test_the_rest_of_what_exchanges_heads(slow_exchanged: Runs, name: str) -> None:
    """Also documents that share a row; and what does not exchange, once others did."""
    runs = slow_exchanged(name)
    _same(runs)
    assert runs.apart < 1e-5


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", FOUR_EXCHANGED)
def test_four_processes_that_exchange_heads_learn_what_one_learns(
    four_exchanged: Runs, name: str
) -> None:
    """Two rows over two processes each, and more processes than key/value heads."""
    runs = four_exchanged(name)
    _same(runs)
    assert runs.apart < 1e-5
    two, one = (_logged(path, "eval_nll") for path in (runs.two, runs.one))
    assert len(two) == (4 if runs.case.evaluated else 0)
    assert two == pytest.approx(one, abs=1e-5)  # of whole rows, with a mask


@pytest.mark.slow
@needs_deepspeed
def test_a_gradient_that_is_no_number_is_not_learnt_from(tmp_path: Path) -> None:
    start(tmp_path, "hurt")


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_learn_what_one_learns(four: Runs, name: str) -> None:
    """Weights and sequences shared at once, and weights shared twice over."""
    runs = four(name)
    _same(runs)
    assert runs.apart < 1e-5


def test_a_checkpoint_of_pieces_serves_in_plain_transformers(quick: Runs) -> None:
    path = quick("fsdp").two / "model"
    plain: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert plain.config.architectures == ["LlamaForCausalLM"]
    model = loaded()[0]
    model.load_state_dict(weights(path), strict=False)
    ids = torch.arange(300)[None] % 1000
    assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("method", "settings", "packed", "says"),
    [
        ("linear:8", {"cp": 2}, True, r"context parallel \(2\) and packing.*Do not pack"),
        ("dynamic:8", {"cp": 2}, False, r"context parallel \(2\) and dynamic"),
        ("alibi", {"cp": 2}, False, r"context parallel \(2\) and alibi"),
        ("linear:8", {"sp": 2}, True, "hands SDPA no document mask.*flash_attention_2"),
        ("linear:8", {"sp": 3}, False, "4 query heads.*Choose a size among"),
        ("linear:8", {"sp": 2}, False, "sp=2 takes 2 processes.* there is 1: torchrun"),
        ("dynamic:8", {"sp": 2}, False, r"sequence parallel \(2\) and dynamic"),
        ("alibi", {"sp": 2}, False, r"sequence parallel \(2\) and alibi"),
        ("linear:8", {"sp": 2, "dp_shard": 2}, False, r"DeepSpeed runs the one and FSDP the other"),
        ("linear:8", {"dp_shard": 2}, True, "take 2 processes.* there is 1: torchrun"),
    ],
)
def test_what_does_not_go_together_is_refused_up_front(
    method: str, settings: dict[str, Any], packed: bool, says: str, tmp_path: Path
) -> None:
    model, tokenizer = longctx.load("demo", device="cpu")
    longctx.extend(model, method)
    with pytest.raises(RunError, match=says):
        finetune(
            model,
            tokenizer,
            Noise(),
            Training(**settings),
            output_dir=tmp_path / "run",
            packed=packed,
        )
    assert not (tmp_path / "run").exists()


def test_pieces_of_documents_and_of_models_are_refused_too(tmp_path: Path) -> None:
    losses = Losses(contrastive=Contrastive())
    with pytest.raises(RunError, match="contrastive: it looks at tokens across a document"):
        train(tmp_path / "a", Training(cp=2), packed=False, losses=losses)
    with pytest.raises(RunError, match="contrastive: it looks at tokens across a document"):
        train(tmp_path / "a", Training(sp=2), packed=False, losses=losses)
    for training in (Training(cp=2), Training(sp=2)):
        with pytest.raises(RunError, match=r"parallel \(2\) and shifted"):
            train(tmp_path / "a", training, packed=False, shifted=True)
    with pytest.raises(RunError, match="needs a whole model in each process, and dp_shard=2"):
        train(tmp_path / "b", Training(dp_shard=2), evaluate=counting())
