"""RULER's prompts as lm-evaluation-harness makes, runs and scores them, beside ours."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

import nltk  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
import pytest
from datasets import Dataset

import longctx
from longctx.eval import Unit
from longctx.eval.tasks.ruler import Ruler
from longctx.eval.tasks.shared.answering import Question

LENGTH, COUNT, NEW = 3000, 1, 24


def documents(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> dict[str, list[Any]]:
    """By the harness's own generators; its essays and sentence splitter would be downloaded."""
    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    niah: Any = importlib.import_module("lm_eval.tasks.ruler.niah_utils")
    prepare: Any = importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
    vt: Any = importlib.import_module("lm_eval.tasks.ruler.vt_utils")
    cwe: Any = importlib.import_module("lm_eval.tasks.ruler.cwe_utils")
    fwe: Any = importlib.import_module("lm_eval.tasks.ruler.fwe_utils")
    monkeypatch.setattr(prepare, "sent_tokenize", lambda text: re.split(r"(?<=\.) ", text))
    essays = [f"word{i}." if i % 9 == 0 else f"word{i}" for i in range(9000)]

    def needles(haystack: Any, kind: str, **settings: Any) -> list[Any]:
        return prepare.generate_samples(
            haystack, TOKENIZER=tokenizer, max_seq_length=LENGTH, type_haystack=kind,
            template=niah.TEMPLATE, num_samples=COUNT, **settings,
        )  # fmt: skip

    words = {"type_needle_k": "words", "type_needle_v": "numbers"}
    repeat, needle = prepare.get_haystack("repeat"), prepare.get_haystack("needle")
    example = vt.sys_vartrack_w_noise_random(tokenizer, 1, 1500, incremental=5)[0]
    return {
        "niah_single_1": needles(repeat, "repeat", **words),
        "niah_multikey_2": needles(needle, "needle", **words),
        "niah_multivalue": needles(essays, "essay", **words, num_needle_v=4),
        "niah_multiquery": needles(essays, "essay", **words, num_needle_q=4),
        "vt": vt.sys_vartrack_w_noise_random(tokenizer, COUNT, LENGTH, icl_example=example),
        "cwe": cwe.sys_word_pair_random(COUNT, LENGTH, tokenizer=tokenizer),
        "fwe": fwe.sys_kwext(tokenizer, LENGTH, num_samples=COUNT),
    }


def run_harness(model: Any, tokenizer: Any, part: str, docs: list[Any]) -> list[Any]:
    """The samples of the harness: context, answer and score of each document."""
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]

    models: Any = importlib.import_module("lm_eval.models.huggingface")
    common: Any = importlib.import_module("lm_eval.tasks.ruler.common_utils")
    task: Any = ConfigurableTask(
        config={
            "task": part,
            "dataset_path": "",
            "dataset_name": "",
            "output_type": "generate_until",
            "test_split": "test",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
            "doc_to_text": "{{input}}",
            "doc_to_target": "{{outputs}}",
            "gen_prefix": "{{gen_prefix}}",
            "target_delimiter": "\n\n" if part == "cwe" else " ",
            "process_results": common.process_results,
            "metric_list": [{"metric": str(LENGTH), "aggregation": "mean"}],
            "generation_kwargs": {
                "do_sample": False, "temperature": 0.0, "max_gen_toks": NEW, "until": [],
            },
            "num_fewshot": 0,
        }
    )  # fmt: skip
    how = {"max_length": 4 * LENGTH, "batch_size": 1}
    wrapped = models.HFLM(pretrained=model, tokenizer=tokenizer, **how)
    harness: Any = lm_eval
    found = harness.evaluate(wrapped, {"tasks": {part: task}, "groups": {}}, bootstrap_iters=0)
    return sorted(found["samples"][part], key=lambda sample: sample["doc_id"])


def check_ruler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tasks: the same text and the same score for each prompt of the harness."""
    model, tokenizer = longctx.load("demo")

    @dataclasses.dataclass(frozen=True, slots=True)
    class Told(Ruler):
        """Asks what it is told."""

        asked: tuple[Question, ...] = ()

        def questions(self, tokenizer: Any, unit: Unit) -> list[tuple[int, Question]]:
            return [(LENGTH, question) for question in self.asked]

    def measured(asked: Question) -> dict[str, Any]:
        how: Any = {"batch_tokens": 1, "length_invariant": True}
        found = Told(asked=(asked,)).measure(model, tokenizer, Unit((LENGTH,), 0), **how)
        return found.observations[0].detail

    common: Any = importlib.import_module("lm_eval.tasks.ruler.common_utils")
    scores: list[float] = []
    parts = documents(monkeypatch, tokenizer)
    for part, docs in parts.items():
        samples = run_harness(model, tokenizer, part, docs)
        for i, (doc, sample) in enumerate(zip(docs, samples, strict=True)):
            context, answer = sample["arguments"][0][0], sample["resps"][0][0]
            assert context.startswith(doc["input"])
            ids = tuple(tokenizer(context)["input_ids"])
            words = answer.split()
            for references in (
                doc["outputs"],
                [words[0], doc["outputs"][0], words[-1].upper(), "nowhere in there"],
                [words[-1], words[0]],
            ):
                asked = Question(f"{i}", f"{i}", ids, tuple(references), NEW, part=part)
                found = measured(asked)
                wanted = common.process_results({**doc, "outputs": references}, [answer])
                assert found["score"] == wanted[str(LENGTH)], part
                assert answer.strip().startswith(found["said"].strip()), part
                assert found["score"] == 1 or found["said"].strip() == answer.strip(), part
                scores.append(found["score"])
            if doc["outputs"][0] not in answer:
                assert sample[str(LENGTH)] == scores[-3]
    assert {0.5, 1.0} <= {*scores}
    assert len(scores) == 3 * COUNT * len(parts)
