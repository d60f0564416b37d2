"""The recipe of the embedded model, and the model that it gave."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import longctx
from longctx.eval import Passkey, sweep
from longctx.prompts.haystacks import Grass, Texts, held_out
from longctx.prompts.passkey_prompts import passkey, split_of
from longctx.train import embedded_model

DEMO = Path(longctx.__file__).parent / "demo"
STAGES = (
    embedded_model.Stage(64, 2, (2, 3, 2), 3e-3, 1),
    embedded_model.Stage(256, 2, (1, 1, 1), 2e-3, 1),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def batches(tokenizer: PreTrainedTokenizerFast) -> embedded_model.Batches:
    text = held_out().documents[0][:40_000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return embedded_model.Batches(tokenizer, Texts((text,)), ids, seed=3)


def hits(
    length: int, count: int, tokenizer: PreTrainedTokenizerFast, model: torch.nn.Module
) -> list[tuple[bool, bool]]:
    """Of `count` fresh keys, in both haystacks: is it far, and would greedy decoding say it?

    Far is a key that ends more than 256 tokens, the window, before the answer.
    """
    found: list[tuple[bool, bool]] = []
    for seed in range(count):
        prompt = passkey(
            tokenizer,
            length,
            depth=Random(f"depth/{seed}").random(),
            seed=seed,
            haystack=Grass() if seed % 2 else held_out(),
        )
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([prompt.input_ids[:-1]]),
                logits_to_keep=len(prompt.answer_ids),
            ).logits[0]
        assert prompt.distance is not None
        said = logits.argmax(-1).tolist() == list(prompt.answer_ids)
        found.append((prompt.distance > 256, said))
    return found


def test_the_embedded_model_finds_keys_within_its_window_alone(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    assert model.config.max_position_embeddings == 256
    # Guards: 396 of 400 were measured within the window, and none of the far ones.
    assert hits(256, 100, tokenizer, model).count((False, True)) >= 96
    for length, count, most in ((1024, 50, 15), (2048, 20, 2)):
        found = hits(length, count, tokenizer, model)
        assert sum(far for far, _ in found) >= 15
        assert (True, True) not in found
        assert found.count((False, True)) <= most


def test_the_tuned_model_finds_keys_at_eight_times_its_window() -> None:
    model, tokenizer = longctx.load("demo-tuned", device="cpu")
    patch = longctx.patch_of(model)
    assert patch is not None
    assert str(patch.method) == "Linear(factor=8, target=None)"
    result = sweep(model, tokenizer, [Passkey(samples=20)], [256, 1024, 2048], progress=False)
    assert [
        row.value >= least for row, least in zip(result.rows, (0.8, 0.7, 0.3), strict=True)
    ] == [True] * 3, result.rows


def test_the_package_stays_small() -> None:
    for folder in (DEMO, DEMO.with_name("demo-tuned")):
        assert sum(path.stat().st_size for path in folder.iterdir()) < 2.5 * 1024**2


def test_training_and_held_out_text_share_no_document_and_hardly_a_line() -> None:
    train, held = embedded_model.held_in().documents, held_out().documents
    assert len(train) == 133
    assert not set(train) & set(held)
    lines = {line for document in train for line in document.splitlines() if len(line) > 60}
    long = [line for document in held for line in document.splitlines() if len(line) > 60]
    assert sum(line in lines for line in long) / len(long) < 0.01


def test_the_recipe_gives_the_packaged_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    trained = embedded_model.train_tokenizer(embedded_model.held_in())
    packaged = json.loads(Tokenizer.from_file(str(DEMO / "tokenizer.json")).to_str())
    assert json.loads(trained.backend_tokenizer.to_str())["model"] == packaged["model"]
    assert len(tokenizer) == 1024
    assert tokenizer.tokenize("9081 0x41") == ["9", "0", "8", "1", "Ġ", "0", "x", "4", "1"]
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 0
    assert tokenizer.chat_template is None
    sample = held_out().documents[3][:5000] + " Ünïcødé\t\r\n"
    assert tokenizer.decode(tokenizer(sample)["input_ids"][1:]) == sample


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage.length} tokens")
def test_batches_depend_on_seed_and_step_alone(
    batches: embedded_model.Batches, stage: embedded_model.Stage
) -> None:
    inputs, labels = batches(7, stage)
    again, _ = batches(7, stage)
    assert torch.equal(inputs, again)
    assert inputs.shape == (sum(stage.samples), stage.length)
    assert [len(kind) for kind in labels] == list(stage.samples)
    for other in (batches(8, stage), embedded_model.Batches(*_fields(batches), seed=4)(7, stage)):
        assert not torch.equal(inputs, other[0])


def _fields(batches: embedded_model.Batches) -> tuple[PreTrainedTokenizerFast, Texts, Tensor]:
    return batches.tokenizer, batches.texts, batches.ids


def test_loss_is_on_the_answer_the_second_copy_and_all_of_the_text(
    batches: embedded_model.Batches,
) -> None:
    for step in range(10):
        inputs, (keys, repeats, texts) = batches(
            step, embedded_model.Stage(64, 1, (4, 4, 4), 1e-3, 1)
        )
        for row, label in zip(inputs[:4], keys, strict=True):
            answer = str(batches.tokenizer.decode(row[label != -100]))
            assert len(answer) == 5
            assert split_of(answer) == "train"
            assert str(batches.tokenizer.decode(row)).endswith(f"The pass key is {answer}")
        for row, label in zip(inputs[4:8], repeats, strict=True):
            begin = int((label == -100).sum())
            size = 64 - begin
            # The label begins at the second token of the copy: its first cannot be known.
            copied = row[64 - size - 1 :]
            assert torch.equal(copied, row[64 - 2 * (size + 1) : 64 - size - 1])
            assert torch.equal(row[begin:], label[begin:])
        assert torch.equal(texts[:, 1:], inputs[8:, 1:])
        assert (inputs[:, 0] == 0).all()


def test_each_kind_weighs_the_same(batches: embedded_model.Batches) -> None:
    model = embedded_model.build_model(0, 500.0).double()
    inputs, labels = batches(0, STAGES[0])
    logs = model(input_ids=inputs).logits.log_softmax(-1)
    means: list[float] = []
    row = 0
    for kind in labels:
        losses: list[float] = []
        for label in kind.tolist():
            losses += [
                -logs[row, i - 1, token].item() for i, token in enumerate(label) if i and token >= 0
            ]
            row += 1
        means.append(sum(losses) / len(losses))
    assert embedded_model.loss_of(model, inputs, labels).item() == pytest.approx(
        sum(means) / 3, rel=1e-9
    )
    assert means[2] == pytest.approx(math.log(1024), rel=0.05)


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: embedded_model.Batches
) -> None:
    monkeypatch.setattr(embedded_model, "held_in", lambda: batches.texts)
    monkeypatch.setattr(embedded_model, "train_tokenizer", lambda _: batches.tokenizer)  # pyright: ignore[reportUnknownLambdaType]
    whole = embedded_model.Pretraining(tmp_path / "whole", stages=STAGES, save_every=3)
    embedded_model.train(whole)

    class InterruptedRunError(Exception):
        pass

    calls = 0

    def loss_until_the_last_step(*args: object) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise InterruptedRunError
        return loss_of(*args)  # pyright: ignore[reportArgumentType]

    loss_of = embedded_model.loss_of
    cut = embedded_model.Pretraining(tmp_path / "cut", stages=STAGES, save_every=3)
    with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):
        patch.setattr(embedded_model, "loss_of", loss_until_the_last_step)
        embedded_model.train(cut)
    assert (tmp_path / "cut.state.pt").exists()
    calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(embedded_model, "loss_of", loss_until_the_last_step)
        embedded_model.train(cut)
    assert calls == 1
    assert not (tmp_path / "cut.state.pt").exists()

    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
    assert one.dtype == torch.float16
    assert one.config.rope_parameters["rope_theta"] == whole.rope_theta
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[name]), name
    assert len(AutoTokenizer.from_pretrained(tmp_path / "cut")) == 1024
