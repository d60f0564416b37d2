"""The harness on a patched model, against log-probabilities that transformers alone gives."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import tyro

import longctx
from longctx.cli.lm_eval import LmEval
from longctx.errors import RunError
from longctx.eval import lm_eval
from longctx.eval.lm_eval import run_lm_eval

from .conftest import byte_model, byte_tokenizer

needs = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)
# What the harness and its libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")

QUESTIONS: list[dict[str, Any]] = [
    {"text": "The grass is", "choices": [" green", " blue"], "label": 0},
    {"text": "The sky " * 60 + "is", "choices": [" green", " blue"], "label": 1},
    {"text": "import os, import", "choices": [" sys", " cat"], "label": 0},
    {"text": "One, two,", "choices": [" three", " tiger"], "label": 1},
]
TASK = """
task: words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

SAY = """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{label}}"
generation_kwargs:
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the task "words"; the thousands that the harness brings are not read."""
    from lm_eval import tasks  # pyright: ignore[reportMissingImports]

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    local = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", local)
    found = tmp_path / "tasks"
    found.mkdir()
    data = found / "words.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (found / "words.yaml").write_text(TASK.format(path=data))
    return found


def right(model: Any, tokenizer: Any) -> list[bool]:
    """Whether the right choice is the likelier one, by whole forward passes."""
    found: list[bool] = []
    for question in QUESTIONS:
        start = tokenizer(question["text"])["input_ids"]
        sums: list[float] = []
        for choice in question["choices"]:
            ids = start + tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            places = range(len(start), len(ids))
            sums.append(sum(float(log_p[i - 1, ids[i]]) for i in places))
        found.append(sums.index(max(sums)) == question["label"])
    return found


@needs
def test_scores_are_those_of_the_patched_model(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    wanted = {"none": right(model, tokenizer)}
    with longctx.extend(model, "yarn", factor=2.0):
        wanted["yarn:2"] = right(model, tokenizer)
    out = tmp_path / "out"
    ask: dict[str, Any] = {"methods": ["none", "yarn:2"], "include_path": folder, "out": out}
    frame = run_lm_eval(model, tokenizer, ["words"], [600, 800], **ask)
    assert list(frame.columns) == ["method", "task", "length", "metric", "value", "stderr", "n"]
    assert frame[["method", "length"]].to_numpy().tolist() == [
        ["none", 600], ["none", 800], ["yarn:2", 600], ["yarn:2", 800],
    ]  # fmt: skip
    for row in frame.to_dict(orient="records"):
        share = sum(wanted[row["method"]]) / 4
        assert (row["task"], row["metric"], row["n"]) == ("words", "acc", 4)
        assert row["value"] == share
        assert row["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 3))
    assert longctx.core.patch_of(model) is None
    written = json.loads((out / "lm_eval.json").read_text())
    assert written["rows"] == frame.to_dict(orient="records")
    assert pd.read_csv(out / "lm_eval.csv").equals(frame)
    assert pd.read_parquet(out / "lm_eval.parquet").equals(frame)


@needs
def test_an_interrupted_call_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask: dict[str, Any] = {"methods": ["none", "yarn:2"], "include_path": folder, "limit": 2}
    asked: list[str] = []  # the results lie among the tasks, of which they are none
    evaluate = lm_eval._evaluate  # pyright: ignore[reportPrivateUsage]

    def interrupted(model: Any, tokenizer: Any, tasks: Any, variant: Any, *rest: Any) -> Any:
        if len(asked) == 1:
            asked.append("interrupted")
            raise KeyboardInterrupt
        asked.append(variant.label)
        return evaluate(model, tokenizer, tasks, variant, *rest)

    monkeypatch.setattr(lm_eval, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_lm_eval(byte_model(), byte_tokenizer(), "words", [600], **ask, out=folder)
    frame = run_lm_eval(byte_model(), byte_tokenizer(), "words", [600], **ask, out=folder)
    assert asked == ["none", "interrupted", "yarn:2"]
    assert frame["n"].tolist() == [2, 2]
    assert run_lm_eval(byte_model(), byte_tokenizer(), "words", [600], **ask, out=folder).equals(
        frame
    )
    assert len(asked) == 3
    fewer: dict[str, Any] = {**ask, "methods": ["none"]}
    with pytest.raises(RunError, match=r"tables with yarn:2, 600 \(method, length\), which"):
        run_lm_eval(byte_model(), byte_tokenizer(), "words", [600], **fewer, out=folder)
    with pytest.raises(RunError, match="another model"):
        run_lm_eval(byte_model(1), byte_tokenizer(), "words", [600], **ask, out=folder)


@needs
def test_the_harness_may_read_as_far_as_length_and_patch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports]

    lengths: list[int] = []
    wrap: Any = huggingface.HFLM

    def spy(**settings: Any) -> Any:
        wrapped = wrap(**settings)
        lengths.append(wrapped.max_length)
        return wrapped

    monkeypatch.setattr(huggingface, "HFLM", spy)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    run_lm_eval(
        byte_model(), tokenizer, ["words"], [600, 1500], methods=["none", "yarn:2"],
        include_path=folder, limit=1,
    )  # fmt: skip
    assert lengths == [600, 1500, 1024, 1500]  # windows of 512 and 1,024
    text = (folder / "words.yaml").read_text().partition("output_type")[0]
    text = text.replace("task: words", "task: say") + SAY
    (folder / "say.yaml").write_text(text)
    run_lm_eval(byte_model(), tokenizer, ["say"], [600], include_path=folder, limit=1)
    assert lengths[4:] == [1624]  # a chat template and the answer may come on top
    assert tokenizer.pad_token is None


@needs
def test_bad_input_is_named(folder: Path) -> None:
    ask: dict[str, Any] = {"include_path": folder}
    model, tokenizer = byte_model(), byte_tokenizer()
    with pytest.raises(RunError, match=r"no task 'wrods'; did you mean 'words'\?"):
        run_lm_eval(model, tokenizer, ["wrods"], [600], **ask)
    (folder / "words.jsonl").unlink()
    with pytest.raises(RunError, match="cannot load task 'words' at 600 tokens: FileNotFound"):
        run_lm_eval(model, tokenizer, ["words"], [600], **ask)
    with pytest.raises(RunError, match="no task: pass names"):
        run_lm_eval(model, tokenizer, [], [600])
    with pytest.raises(RunError, match="limit=0, batch_size=1"):
        run_lm_eval(model, tokenizer, ["words"], [600], limit=0)
    with pytest.raises(RunError, match="has no chat template: pass chat=False"):
        run_lm_eval(model, tokenizer, ["words"], [600], chat=True, **ask)
    with pytest.raises(RunError, match="prompts as a whole: read:map is for longctx sweep"):
        run_lm_eval(model, tokenizer, ["words"], [600], methods=["read:map"], **ask)
    with pytest.raises(RunError, match="is not a folder"):
        run_lm_eval(model, tokenizer, ["words"], [600], include_path=folder / "words.yaml")


@needs
@pytest.mark.slow
def test_a_task_of_ruler_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only kind of haystack that needs no download: niah_single_1, multikey_2 and _3."""
    from lm_eval import tasks  # pyright: ignore[reportMissingImports]

    local = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", local)
    ruler = Path(str(tasks.__file__)).parent / "ruler"
    model, tokenizer = longctx.load("demo", device="cpu")
    frame = run_lm_eval(
        model, tokenizer, ["niah_single_1"], [512], methods=["none", "yarn:4"], limit=2,
        include_path=ruler,
    )  # fmt: skip
    assert frame["metric"].tolist() == ["score", "score"]
    assert frame["n"].tolist() == [2, 2]
    assert frame["value"].between(0, 1).all()


def test_without_the_harness_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(lm_eval, "version", missing)
    with pytest.raises(RunError, match=r"pip install 'longctx-toolkit\[lm-eval\]'"):
        run_lm_eval(byte_model(), byte_tokenizer(), ["words"], [600])


def test_metrics_by_hand() -> None:
    read = lm_eval._metrics  # pyright: ignore[reportPrivateUsage]
    figures = {
        "name": "t", "alias": "t", "sample_len": 3,
        "4096,none": -1, "4096_stderr,none": "N/A", "512,none": 0.5, "512_stderr,none": "N/A",
        "em,strict": 1.0, "em_stderr,strict": 0.25,
    }  # fmt: skip
    samples = [{"filter": "none", "512": 1.0}, {"filter": "none", "512": 0.0}]
    found = list(read(figures, samples, 512))
    assert found == [("score", 0.5, 0.5), ("em,strict", 1.0, 0.25)]
    ((_, _, error),) = read({"word_perplexity,none": 9.0}, [{"word_perplexity": (1.0, 2)}], 512)
    assert math.isnan(error)


def test_the_command_line() -> None:
    command = tyro.cli(
        LmEval, args=["demo", "--tasks", "a", "b", "--lengths", "4096", "8k", "--methods", "yarn:2"]
    )
    assert command.tasks == ("a", "b")
    assert command.lengths == ("4096", "8k")
    assert command.out is None
