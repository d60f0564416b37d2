"""A decode bench: figures by hand and by brute force, resuming, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import longctx
from longctx.cli.main import main
from longctx.errors import DataError, RunError
from longctx.eval import BenchSettings, decode_bench
from longctx.eval.decoding.figures import Read, Written, decoding_figures, model_figures
from longctx.eval.decoding.result import TEXT
from longctx.eval.tasks.shared.repetition_metrics import rep_l, wrep_l
from longctx.eval.tasks.shared.texts import documents_of, texts_of
from longctx.prompts.haystacks import bos_of

SMALL = BenchSettings(prompts=4, prompt_tokens=16, new_tokens=12, samples=2, keys=2)


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return longctx.load("demo")


def test_wrep_counts_repeats_that_are_wrong() -> None:
    rng = Random(1)
    for _ in range(50):
        context, predicted, targets = ([rng.randrange(6) for _ in range(20)] for _ in range(3))
        for l in (1, 3, 20):  # noqa: E741
            recent = [predicted[t] in context[max(0, t - l + 1) : t + 1] for t in range(20)]
            wrong = [r and predicted[t] != targets[t] for t, r in enumerate(recent)]
            assert rep_l(predicted, context, l) == sum(recent) / 20
            assert wrep_l(predicted, context, targets, l) == sum(wrong) / 20
    with pytest.raises(DataError, match="2 predictions, 1 targets"):
        wrep_l([1, 2], [1, 2], [1], 4)


def test_figures_of_a_model_by_hand() -> None:
    windows = [
        Read("a", (1, 2, 1), (2, 1, 3), (2, 2, 3), 3 * math.log(4)),
        Read("b", (5, 6, 7), (6, 7, 8), (5, 6, 9), 3 * math.log(4)),
    ]
    found = model_figures(windows)
    assert found["ppl"].value == pytest.approx(4)
    assert found["accuracy"].value == 2 / 6
    assert found["rep/16"].value == 3 / 6  # 2 after 1, 2; 5 after 5; 6 after 5, 6
    assert found["wrep/16"].value == 3 / 6


def test_figures_of_a_decoding_by_hand() -> None:
    loop, varied = (1, 2) * 4, tuple(range(8))
    found = decoding_figures(
        [
            Written("a", 0, loop),
            Written("a", 0, loop),
            Written("b", 1, varied),
            Written("b", 1, varied),
        ]
    )
    assert found["seq-rep-4"].value == pytest.approx((3 / 5 + 0) / 2)
    assert found["loops"].value == 0.5
    assert found["uniq-seq"].value == 8
    assert found["different tokens"].value == 5
    assert found["self-BLEU"].value == pytest.approx(1)
    assert found["cross-BLEU"].value < 0.2
    flat = decoding_figures([Written("a", 0, (0, 1, 2, 3)), Written("b", 1, (4, 5, 6, 7))])
    assert flat["entropy"].value == 3.0
    assert "self-BLEU" not in flat


def test_both_blocks_and_resuming(demo: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = demo
    decodings = ["greedy", "sample:temperature=0.9"]
    found = decode_bench(
        model, tokenizer, decodings, settings=SMALL, folder=tmp_path, progress=False
    )
    assert list(found.decoding_block) == [TEXT, *decodings]
    assert "self-BLEU" in found.decoding_block[decodings[1]]
    assert "self-BLEU" not in found.decoding_block["greedy"]
    # The model's block, by a plain forward.
    ids = torch.tensor(_windows(tokenizer, SMALL))
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:])
    assert found.model_block["ppl"].value == pytest.approx(float(nll.exp()), rel=1e-4)
    right = (logits.argmax(-1) == ids[:, 1:]).double().mean()
    assert found.model_block["accuracy"].value == pytest.approx(float(right))
    # Cut off in the middle of a line, it goes on to the same figures.
    files = sorted(tmp_path.glob("*.jsonl"))
    assert len(files) == 4
    whole = {file: file.read_text() for file in files}
    for file in files:
        file.write_text(whole[file][: len(whole[file]) // 2])
    again = decode_bench(
        model, tokenizer, decodings, settings=SMALL, folder=tmp_path, progress=False, batch_size=3
    )
    assert again == found
    assert {file: file.read_text() for file in files} == whole
    other = BenchSettings(prompts=4, prompt_tokens=16, new_tokens=13, samples=2, keys=2)
    with pytest.raises(RunError, match="name another"):
        decode_bench(model, tokenizer, decodings, settings=other, folder=tmp_path, progress=False)


def _windows(tokenizer: Any, settings: BenchSettings) -> list[list[int]]:
    documents = documents_of(tokenizer, texts_of(()))
    size = settings.prompt_tokens + settings.new_tokens
    return [[*bos_of(tokenizer), *ids[:size]] for ids in list(documents.values())[:4]]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"prompts": 1}, "prompts=1"),
        ({"new_tokens": 2}, "new_tokens=2"),
        ({"samples": True}, "samples=True"),
        ({"guard": "bann"}, "did you mean 'ban'"),
    ],
)
def test_settings_that_cannot_be(settings: Any, found: str) -> None:
    with pytest.raises(RunError, match=found):
        BenchSettings(**settings)


def test_what_is_refused(demo: tuple[Any, Any], tmp_path: Path) -> None:
    for decodings, found in (
        ([], "no decodings"),
        (["greedy", "greedy"], "asked for twice"),
        (["gredy"], "did you mean 'greedy'"),
    ):
        with pytest.raises(RunError, match=found):
            decode_bench(*demo, decodings, settings=SMALL, folder=tmp_path)
    long = BenchSettings(prompt_tokens=200, new_tokens=100)
    with pytest.raises(DataError, match="window is 256"):
        decode_bench(*demo, ["greedy"], settings=long, folder=tmp_path)
    (tmp_path / "short.txt").write_text("One two.")
    with pytest.raises(DataError, match="0 windows of 28 tokens"):
        short = BenchSettings(prompt_tokens=16, new_tokens=12, text=(str(tmp_path / "short.txt"),))
        decode_bench(*demo, ["greedy"], settings=short, folder=tmp_path)


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    line = ["decode-bench", "demo", "--decodings", "greedy", "dry", "--prompts", "3"]
    line += ["--prompt-tokens", "16", "--new-tokens", "12", "--keys", "0", "--out", str(tmp_path)]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert TEXT in said
    assert "wrep/128" in said
    rows = list(csv.DictReader((tmp_path / "decodings.csv").read_text().splitlines()))
    (bench,) = json.loads((tmp_path / "decodings.json").read_text())
    assert {row["decoding"] for row in rows} == {"", TEXT, "greedy", "dry"}
    assert bench["decoding_block"]["dry"]["seq-rep-4"]["value"] is not None
    assert (tmp_path / "decodings.png").read_bytes()[:4] == b"\x89PNG"
    assert main(line) == 2
    assert "pass overwrite" in capsys.readouterr().err
    assert main([*line, "--overwrite"]) == 0
    assert main(["decode-bench", "demo", "demo", *line[2:]]) == 2
