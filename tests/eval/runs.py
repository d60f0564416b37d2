"""Folders of sweeps that no model was run for, in the formats that real ones have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pyarrow as pa

from longctx.eval import Observation, Passkey, Perplexity, Summary, SweepResult, Task
from longctx.eval.reporting.files import write_sweep
from longctx.eval.results.records import Record
from longctx.eval.results.store import Store
from longctx.eval.results.sweep_result import rows_of
from longctx.eval.results.variants import Variant
from longctx.eval.results.verification import Verification

IDENTITY = {"model": "0123456789abcdef", "tokenizer": "fedcba9876543210"}
WINDOW = 512
NASTY = '</script><img src=x onerror="document.title=1">'


@dataclass(frozen=True, slots=True)
class _Repetition:
    """As much of a task as a table needs."""

    name: ClassVar[str] = "repetition"
    scale: ClassVar[str] = "share"
    higher_is_better: ClassVar[bool] = False
    figure: ClassVar[str | None] = "seq_rep_4"
    estimand: ClassVar[str] = "mean seq-rep-4"

    def report_identity(self) -> dict[str, Any]:
        return self.cache_key()

    def cache_key(self) -> dict[str, Any]:
        return {"prompt": NASTY}

    def summarise(self, observations: Sequence[Observation]) -> Summary:
        values = [o.detail["seq_rep_4"] for o in observations]
        return Summary(sum(values) / len(values), math.nan, math.nan, "none")


def write_run(
    folder: Path,
    *,
    methods: Sequence[str] = ("none", "yarn:4"),
    lengths: Sequence[int] = (256, 512, 1024),
    samples: int = 20,
    model: str = "tiny",
    failed: int | None = None,
    random_depths: bool = False,
) -> SweepResult:
    """Write a folder as `longctx sweep --out` does; `failed` is a length that ran out of memory."""
    tasks: list[Any] = [Passkey(samples=samples), Perplexity(), _Repetition()]
    variants = [Variant(label, (), None, WINDOW, True) for label in methods]
    store = Store(folder / "results.jsonl", IDENTITY)
    random, records = Random(0), list[Record]()
    for turn, variant in enumerate(variants):
        for length in lengths:
            keys = tuple(
                _key(random, length, item, samples, turn, random_depths) for item in range(samples)
            )
            out = "out of memory" if length == failed else None
            name = f"key{turn}-{length}"
            record = Record(
                name, variant.label, "passkey", (length,), length * samples, 1.5, "whole prompts",
                () if out else keys, out,
            )  # fmt: skip
            records.append(store.put(record))
            texts = tuple(
                Observation(length, str(i), f"d{i}", 0.0, 64, None, _repeats(random, i))
                for i in range(4)
            )
            name = f"rep{turn}-{length}"
            record = Record(
                name, variant.label, "repetition", (length,), 256, 0.5, "generated", texts
            )
            records.append(store.put(record))
        for document in ("a", "b", "c"):
            records.append(_text(store, variant.label, document, tuple(lengths), random))
    store.close()
    result = SweepResult(
        model=model,
        identity=IDENTITY,
        original_window=WINDOW,
        lengths=tuple(lengths),
        tasks=tuple(tasks),
        variants=tuple(variants),
        rows=tuple(
            row
            for variant in variants
            for task in tasks
            for row in rows_of(variant, task, lengths, _of(records, variant.label, task))
        ),
        records=tuple(records),
        notes=(f"a note with {NASTY}",),
        results=folder / "results.jsonl",
        verified=(Verification(methods[0], "passkey", 3, ("prompt 1 at 256: otherwise",)),),
    )
    write_sweep(result, folder)
    return result


def _of(records: Sequence[Record], method: str, task: Task) -> list[Record]:
    return [r for r in records if (r.method, r.task) == (method, task.name)]


def _key(
    random: Random, length: int, item: int, samples: int, turn: int, anywhere: bool
) -> Observation:
    depth = random.random() if anywhere else (item // 2 % 5) / 4
    right = random.random() < 1.1 - 0.3 * math.log2(length / 256) + 0.05 * turn
    detail = {
        "key": "84621",
        "depth": depth,
        "wanted_depth": depth,
        "haystack": "grass" if item % 2 else "manual@17",
        "seed": item,
        "argmax": "84621" if right else f"{NASTY}\n{item}",
    }
    return Observation(length, str(item), f"h{item}", 0.5 + random.random(), 5, right, detail)


def _repeats(random: Random, item: int) -> dict[str, Any]:
    return {"seq_rep_4": random.random(), "loop_onset": 7 if item % 2 else None, "text": NASTY}


def _text(
    store: Store, method: str, document: str, lengths: tuple[int, ...], random: Random
) -> Record:
    longest = max(lengths)
    nll = [2 + 0.004 * min(max(0, i - WINDOW), WINDOW) + random.random() for i in range(1, longest)]
    table = pa.table(
        {
            "method": [method] * len(nll),
            "document": [document] * len(nll),
            "length": pa.array([longest] * len(nll), pa.int32()),
            "index": pa.array(range(1, longest), pa.int32()),
            "context": pa.array(range(1, longest), pa.int32()),
            "token": pa.array([5] * len(nll), pa.int32()),
            "nll": pa.array(nll, pa.float32()),
        }
    )
    found = tuple(
        Observation(
            n, f"{document}@0", document, math.fsum(nll[n - 129 : n - 1]), 128,
            detail={"start": 0, "prefix_nll": math.fsum(nll[: n - 1]), "prefix_targets": n - 1},
        )
        for n in lengths
    )  # fmt: skip
    name = f"text-{method.replace(':', '')}-{document}"
    record = Record(name, method, "perplexity", lengths, longest, 0.7, "one pass", found)
    return store.put(record, table)
