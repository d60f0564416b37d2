"""Runs of the embedded model: resumed, refused, stopped, and served as they were trained."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import longctx
from longctx.errors import RunError
from longctx.patch import methods_of
from longctx.train.config import Gate, Training
from longctx.train.data.collate import Collator
from longctx.train.data.sampling import TrainDataset
from longctx.train.data.tokenize import IGNORED
from longctx.train.engine.export import difference, probe
from longctx.train.engine.finetune import Finetuned, finetune
from longctx.train.engine.lora import Lora
from longctx.train.loss.objective import Losses
from longctx.train.loss.sequence_unlikelihood import SequenceUnlikelihood

STEPS = Training(max_steps=6, batch_size=2, learning_rate=1e-3, warmup=1, save_every=2)


class Noise(TrainDataset):
    """Packed rows of random tokens, each by its number."""

    def __init__(
        self, rows: int = 12, lengths: tuple[int, ...] = (40, 24), last: int = 999
    ) -> None:
        self.rows = rows
        self.lengths = lengths
        self.last = last

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index > self.last:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 1000, (sum(self.lengths),), generator=generator).tolist()
        return {"input_ids": ids, "labels": [IGNORED, *ids[1:]], "seq_lengths": list(self.lengths)}


def loaded(method: str = "linear:8") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = longctx.load("demo", device="cpu")
    longctx.extend(model, method)
    return model, tokenizer


def train(
    output_dir: Path,
    training: Training = STEPS,
    train_dataset: TrainDataset | None = None,
    *,
    method: str = "linear:8",
    **rest: Any,
) -> Finetuned:
    model, tokenizer = loaded(method)
    return finetune(
        model,
        tokenizer,
        train_dataset or Noise(),
        training,
        output_dir=output_dir,
        progress=False,
        **rest,
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finetuned]:
    path = tmp_path_factory.mktemp("whole") / "run"
    return path, train(path)


def test_what_is_saved_serves_in_plain_transformers(whole: tuple[Path, Finetuned]) -> None:
    path, done = whole
    assert done.updates == 6
    assert done.tokens == 12 * 64
    assert done.losses[-1] < done.losses[0]
    plain: Any = AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32)
    ids = torch.arange(300)[None] % 1000
    assert torch.equal(plain(input_ids=ids).logits, done.model(input_ids=ids).logits)
    assert plain.config.max_position_embeddings == 2048
    assert plain.config.use_cache
    card = (path / "model" / "README.md").read_text()
    assert "from `demo`: `Linear(factor=8" in card
    assert "768 tokens" in card
    log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    assert [entry["loss"] for entry in log if "loss" in entry] == list(done.losses)


def test_the_first_loss_is_that_of_its_rows_alone(whole: tuple[Path, Finetuned]) -> None:
    """Packed documents, divided by all supervised tokens: against one call for each document."""
    model: Any = loaded()[0]
    train_dataset = Noise()
    nats, count = 0.0, 0
    for row in (train_dataset[0], train_dataset[1]):
        start = 0
        for length in row["seq_lengths"]:
            ids = torch.tensor(row["input_ids"][start : start + length])[None]
            loss = model(input_ids=ids, labels=ids).loss.item()
            nats, count, start = nats + loss * (length - 1), count + length - 1, start + length
    assert whole[1].losses[0] == pytest.approx(nats / count, abs=1e-5)


def test_accumulated_rows_are_the_rows_of_one_batch(
    whole: tuple[Path, Finetuned], tmp_path: Path
) -> None:
    done = train(tmp_path / "run", replace(STEPS, batch_size=1, gradient_accumulation_steps=2))
    assert done.losses == pytest.approx(whole[1].losses, abs=1e-5)


def test_updates_of_sequence_unlikelihood_take_turns_and_are_logged_apart(tmp_path: Path) -> None:
    settings = SequenceUnlikelihood(tokens=30, prefix=20)
    turns = [settings.has_turn(step) for step in range(6)]
    assert 0 < sum(turns) < 6
    model, _ = loaded()
    batch = Collator()([Noise()[2 * turns.index(True)], Noise()[2 * turns.index(True) + 1]])
    done = train(
        tmp_path / "run", replace(STEPS, learning_rate=1e-9), losses=Losses(sequence=settings)
    )
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = {entry["step"]: entry for entry in log if "grad_norm" in entry}
    assert [("sequence_loss" in logged[n + 1], "loss" in logged[n + 1]) for n in range(6)] == [
        (turn, not turn) for turn in turns
    ]
    assert len(done.losses) == 6 - sum(turns)
    first = turns.index(True)
    prefixes = settings.prefixes(batch, first)
    expected = settings(model, prefixes)
    read = [logged[n + 1]["tokens"] - (logged[n]["tokens"] if n else 0) for n in range(6)]
    assert read[first] == len(prefixes) * (20 + 30)
    assert all(count == 128 for count, turn in zip(read, turns, strict=True) if not turn)
    assert all("epoch" not in entry for entry in log)
    assert logged[first + 1]["sequence_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert expected > 0


def test_checkpointed_activations_change_nothing(
    whole: tuple[Path, Finetuned], tmp_path: Path
) -> None:
    done = train(tmp_path / "run", replace(STEPS, gradient_checkpointing="layers"))
    assert done.losses == pytest.approx(whole[1].losses, abs=1e-6)


def test_an_interrupted_run_ends_as_the_uninterrupted_one_bit_for_bit(
    whole: tuple[Path, Finetuned], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(
            path, train_dataset=Noise(last=7)
        )  # in the fourth update; the last checkpoint is the second's
    # As kills while writing would leave it: a checkpoint, the model, and before it was looked at.
    for left in ("checkpoints/checkpoint-3", ".model-unchecked-x", "model-unchecked"):
        (path / left).mkdir()
    (path / "model-unchecked" / "config.json").write_text("{}")
    done = train(path, resume=True)
    assert done.losses == whole[1].losses
    assert done.tokens == whole[1].tokens
    ours, theirs = weights(path / "model"), weights(whole[0] / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {found.name for found in path.iterdir()} == {found.name for found in whole[0].iterdir()}
    lines = (path / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"loss"' in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_methods_on_top_of_each_other_are_trained_resumed_and_saved(tmp_path: Path) -> None:
    method = "yarn:2+log_n:kind=ssmax"  # log_n changes nothing within the window that is trained
    steps = Training(max_steps=3, warmup=1, save_every=1)
    rows: dict[str, Any] = {"rows": 3, "lengths": (300, 60)}
    whole = train(tmp_path / "whole", steps, Noise(**rows), method=method)
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(path, steps, Noise(**rows, last=1), method=method)
    with pytest.raises(RunError, match="method"):
        train(path, steps, Noise(**rows), method="yarn:4+log_n", resume=True)
    done = train(path, steps, Noise(**rows), method=method, resume=True)
    assert done.losses == whole.losses
    alone = train(tmp_path / "yarn", steps, Noise(**rows), method="yarn:2")
    assert done.losses[0] != alone.losses[0]
    assert "`Yarn(factor=2" in (card := (path / "model" / "README.md").read_text())
    assert " + `LogN(" in card
    served: Any = longctx.load(path / "model", device="cpu")[0]
    assert methods_of(served) == longctx.parse_methods(method)
    ids = torch.arange(400)[None] % 1000
    assert torch.equal(served(input_ids=ids).logits, whole.model(input_ids=ids).logits)


@pytest.mark.slow
def test_a_killed_run_ends_as_the_uninterrupted_one_bit_for_bit(
    whole: tuple[Path, Finetuned], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    code = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from tests.train.engine.test_finetune import Noise, train
        class Slow(Noise):
            def __getitem__(self, index):
                time.sleep(0.2)
                return super().__getitem__(index)
        train(Path({str(path)!r}), train_dataset=Slow())
        """
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    while not (path / "checkpoints" / "checkpoint-2").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(float(torch.rand(())))
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = train(path, resume=True)
    assert done.losses == whole[1].losses
    ours, theirs = weights(path / "model"), weights(whole[0] / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_folder_is_never_taken_twice(whole: tuple[Path, Finetuned], tmp_path: Path) -> None:
    for resume in (False, True):
        with pytest.raises(RunError, match="is finished: its model is"):
            train(whole[0], resume=resume)
    begun = tmp_path / "begun"
    with pytest.raises(KeyboardInterrupt):
        train(begun, train_dataset=Noise(last=7))
    with pytest.raises(RunError, match="holds a run already: pass resume"):
        train(begun)
    with pytest.raises(RunError, match=r"another run \(seed: 0 there, 5 here\): ask"):
        train(begun, replace(STEPS, seed=5), resume=True)
    with pytest.raises(RunError, match=r"another run \(evaluated: False there, True here\)"):
        train(begun, resume=True, evaluate=counting())
    other, tokenizer = loaded()
    with torch.no_grad():
        next(other.parameters()).mul_(1.001)  # of the same name
    with pytest.raises(RunError, match=r"another run \(weights: "):
        finetune(other, tokenizer, Noise(), STEPS, output_dir=begun, resume=True, progress=False)
    # Where it came from, how often it is kept and what is recomputed do not make it another.
    same, tokenizer = loaded()
    same.name_or_path = "elsewhere"
    settings = replace(STEPS, save_every=3, gradient_checkpointing="layers")
    done = finetune(
        same, tokenizer, Noise(), settings, output_dir=begun, resume=True, progress=False
    )
    assert done.losses == pytest.approx(whole[1].losses, abs=1e-6)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds something that is not a run"):
        train(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_loss_that_is_no_number_stops_before_it_is_learnt(tmp_path: Path) -> None:
    class Broken(Noise):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 8:  # fetched while the fourth update runs, one batch ahead
                next(model.parameters()).data.fill_(math.nan)
            return super().__getitem__(index)

    model, tokenizer = loaded()
    with pytest.raises(RunError, match=r"loss is nan in update 4, rows 6 to 7 .*checkpoint-2 is"):
        finetune(model, tokenizer, Broken(), STEPS, output_dir=tmp_path / "run", progress=False)
    done = train(tmp_path / "run", resume=True)
    assert all(map(math.isfinite, done.losses))


def test_a_full_disk_leaves_the_checkpoint_before(
    whole: tuple[Path, Finetuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(value: Any, path: Any, *rest: Any, **named: Any) -> None:
        if "checkpoint-4" in str(path) and str(path).endswith("scheduler.pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(value, path, *rest, **named)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"No space left.*checkpoint-2 is what there is to resume"):
        train(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint-4").exists()
    monkeypatch.undo()
    assert train(tmp_path / "run", resume=True).losses == whole[1].losses


def test_a_model_that_reloads_otherwise_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longctx.train.engine.export._difference", lambda model, saved: 0.5)
    with pytest.raises(RunError, match=r"model-unchecked: reloaded, its logits are off by 0\.5"):
        train(tmp_path / "run", replace(STEPS, max_steps=2))
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    assert train(tmp_path / "run", replace(STEPS, max_steps=2), resume=True).saved.plain


def test_positions_beyond_the_window_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"position 2,048 in a model with a window of 2,048 tokens"):
        train(tmp_path / "run", replace(STEPS, max_steps=1), Noise(lengths=(2049,)))


def test_more_updates_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"7 updates of 2 rows need 14 rows, train_dataset has 12"):
        train(tmp_path / "run", replace(STEPS, max_steps=7))
    # Nothing was begun, so the folder takes the run that was meant.
    assert train(tmp_path / "run", replace(STEPS, max_steps=1)).updates == 1


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_every_schedule_warms_up(tmp_path: Path, schedule: Any) -> None:
    train(tmp_path / "run", replace(STEPS, max_steps=4, warmup=2, schedule=schedule))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    assert (rates[3] == rates[2]) == (schedule == "constant")


def counting() -> Any:
    """Figures that change with every evaluation."""
    calls: list[int] = []

    def figures(model: PreTrainedModel) -> Mapping[str, float]:
        assert not model.training
        calls.append(1)
        return {"perplexity@256": 10.0 + len(calls), "passkey@2048": 1.0 / len(calls)}

    return figures


def test_figures_before_between_and_after(tmp_path: Path) -> None:
    done = train(tmp_path / "run", replace(STEPS, evaluate_every=2), evaluate=counting())
    assert done.before == {"perplexity@256": 11.0, "passkey@2048": 1.0}
    assert done.after == {
        "perplexity@256": 14.0,
        "passkey@2048": 0.25,
    }  # not asked twice at the end
    assert "| passkey@2048 | 1 | 0.25 |" in (tmp_path / "run/model/README.md").read_text()


def test_figures_before_and_after_where_none_are_asked_for_between(tmp_path: Path) -> None:
    done = train(tmp_path / "run", evaluate=counting())
    assert done.before == {"perplexity@256": 11.0, "passkey@2048": 1.0}
    assert done.after == {"perplexity@256": 12.0, "passkey@2048": 0.5}


def test_the_gate_stops_a_run_that_forgets_its_old_window(tmp_path: Path) -> None:
    gate = Gate(short="perplexity@256", worse=0.1)
    done = train(tmp_path / "run", replace(STEPS, evaluate_every=2), evaluate=counting(), gate=gate)
    assert done.updates == 4  # 11 → 12 → 13: beyond 12.1 at the second
    assert done.stopped.startswith(
        "the run was ended: perplexity@256 went from 11 to 13 by update 4 of 6"
    )
    warned = replace(gate, action="warn")
    done = train(
        tmp_path / "on", replace(STEPS, evaluate_every=2), evaluate=counting(), gate=warned
    )
    assert done.updates == 6
    assert not done.stopped


def test_the_gate_asked_at_the_end_alone_ends_nothing(tmp_path: Path) -> None:
    gate = Gate(short="perplexity@256", worse=0.05)
    done = train(tmp_path / "run", evaluate=counting(), gate=gate)
    assert done.updates == 6
    assert done.stopped.startswith("perplexity@256 went from 11 to 12 by update 6 of 6")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "Beyond what was allowed: perplexity@256 went" in card


def test_a_resumed_run_is_measured_when_the_uninterrupted_one_is(tmp_path: Path) -> None:
    often = replace(STEPS, evaluate_every=4)
    wanted = train(tmp_path / "whole", often, evaluate=counting())
    figures = counting()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", often, Noise(last=7), evaluate=figures)
    done = train(tmp_path / "run", often, evaluate=figures, resume=True)
    assert (done.before, done.after) == (wanted.before, wanted.after)


def test_adapters_on_a_base_in_half_precision_say_what_merging_rounds(tmp_path: Path) -> None:
    model, tokenizer = loaded()
    settings = replace(STEPS, max_steps=3)
    how: dict[str, Any] = {"lora": Lora(r=4), "progress": False}
    done = finetune(model, tokenizer, Noise(), settings, output_dir=tmp_path / "whole", **how)
    assert done.rounded < 1e-5
    model, tokenizer = longctx.load("demo", device="cpu", dtype="bfloat16")
    longctx.extend(model, "linear", factor=8)
    done = finetune(model, tokenizer, Noise(), settings, output_dir=tmp_path / "half", **how)
    assert 1e-4 < done.rounded < 0.1
    card = (tmp_path / "half" / "model" / "README.md").read_text()
    assert f"into weights in bfloat16, whose rounding moved logits by {done.rounded:.1%}" in card
    assert "merged into" not in (tmp_path / "whole" / "model" / "README.md").read_text()


def test_settings_that_act_further_out_alone_are_seen_after_reloading() -> None:
    model, _ = longctx.load("demo", device="cpu")
    longctx.extend(model, "dynamic", factor=8)
    plain, _ = longctx.load("demo", device="cpu")
    plain.config.max_position_embeddings = 2048
    here, there = probe(model), probe(plain)
    assert difference(here[0], there[0]) < 1e-5  # within the old window it is the same model
    assert difference(here[1], there[1]) > 1e-2


def test_the_best_checkpoint_is_what_is_saved(tmp_path: Path) -> None:
    done = train(
        tmp_path / "run",
        replace(STEPS, evaluate_every=2),
        evaluate=counting(),
        gate=Gate(best="passkey@2048"),  # falls with every evaluation: the first one is the best
    )
    assert done.updates == 6
    best = weights(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    ours = weights(tmp_path / "run" / "model")
    assert all(torch.equal(ours[name], best[name]) for name in best)


def test_a_gate_on_a_figure_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="asks for 'passkey@512', the evaluation gives perplexity"):
        often = replace(STEPS, evaluate_every=2)
        train(tmp_path / "a", often, evaluate=counting(), gate=Gate(best="passkey@512"))
    with pytest.raises(RunError, match="needs figures: pass `evaluate`"):
        train(tmp_path / "b", gate=Gate(short="perplexity@256"))
    with pytest.raises(RunError, match="no evaluation on the way: pass evaluate_every"):
        train(tmp_path / "c", evaluate=counting(), gate=Gate(best="passkey@2048"))


def test_a_run_of_a_version_with_other_names_of_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text('{"model": "demo", "steps": 6, "accumulate": 1}')
    (tmp_path / "run/log.jsonl").write_text("")
    with pytest.raises(RunError, match=r"another version of longctx.*choose another folder"):
        train(tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("save_total_limit", 1),
        ("max_steps", 0),
        ("learning_rate", 0.0),
        ("schedule", "sine"),
    ],
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RunError, match=f"{name}='?{value}"):
        replace(STEPS, **{name: value})
