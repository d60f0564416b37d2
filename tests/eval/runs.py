"""Folders of sweeps that no model was run for, in the formats that real ones have."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pyarrow as pa

from longctx.eval import Observation, Passkey, Perplexity, Summary, SweepResult, Task
from longctx.eval.reporting.files import write_sweep
from longctx.eval.results.records import Record, dump_record, header_of
from longctx.eval.results.store import Store
from longctx.eval.results.sweep_result import rows_of
from longctx.eval.results.variants import Variant
from longctx.eval.results.verification import Verification
from longctx.eval.tasks.ruler import Ruler
from longctx.eval.tasks.shared.ruler_prompts import PARTS

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


WIDE_METHODS = (
    "none", "linear:8", "ntk:8", "ntk_by_parts:8", "yarn:8", "llama3:8", "resonance:8",
    "dynamic:8", "dual_chunk:factor=8", "dual_chunk:factor=8,log_n=True", "rerope:factor=8",
    "self_extend:factor=8", "sink_window:window=252", "yarn:2 + dual_chunk:factor=4,log_n=True",
)  # fmt: skip
_HIDDEN = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
    "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1",
)  # fmt: skip


def write_wide_run(
    folder: Path, *, model: str = "tiny-135M", seed: int = 0, hidden: int = len(_HIDDEN)
) -> SweepResult:
    """Write a folder of as many methods and tasks as one sweep may have: 14 of both, 5 lengths."""
    lengths, window, samples = (4096, 8192, 16384, 32768, 65536), 8192, 20
    names = _HIDDEN[:hidden]
    keys: list[Any] = [type(n, (Passkey,), {"name": n})(samples=samples) for n in names]
    tasks: list[Any] = [*keys, Ruler(samples=5), Perplexity()]
    variants = [Variant(label, (), None, window, True) for label in WIDE_METHODS]
    random, records = Random(seed), list[Record]()
    for turn, variant in enumerate(variants):
        reach = 8192 * 2 ** (min(turn, 7 + random.random()) * 0.4 - 0.3)

        def right(length: int, hard: float, reach: float = reach) -> bool:
            logit = 3 - 2 * hard - 2.5 * math.log2(length / reach)
            return random.random() < 1 / (1 + math.exp(-logit))

        for number, task in enumerate(tasks):
            for length in lengths:
                if task.name == "perplexity":
                    found = [
                        Observation(
                            length, f"{d}@0", d, 128 * (2.5 + random.random() * 0.3), 128,
                            detail={"prefix_nll": 2.6 * length, "prefix_targets": length},
                        )
                        for d in "abcdefgh"
                    ]  # fmt: skip
                elif task.name == "ruler":
                    found = [
                        Observation(
                            length, f"{part}/{i}", f"{part}/{i}", 0.0, 0,
                            detail={"part": part, "score": float(right(length, k / 8)), "key": "k"},
                        )
                        for k, part in enumerate(PARTS)
                        for i in range(5)
                    ]  # fmt: skip
                else:
                    found = [
                        Observation(
                            length, str(i), f"h{i}", 0.5, 5, hit := right(length, number / 8),
                            {"key": "84621", "depth": i % 10 / 9, "wanted_depth": i % 10 / 9,
                             "haystack": "grass" if i % 2 else "manual@17", "seed": i,
                             "argmax": "84621" if hit else "80000"},
                        )
                        for i in range(samples)
                    ]  # fmt: skip
                records.append(
                    Record(
                        f"{turn}-{task.name}-{length}", variant.label, task.name, (length,),
                        length * 12, length / 800, "shared prefixes", tuple(found),
                    )
                )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(header_of(IDENTITY)), *map(dump_record, records)]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    result = SweepResult(
        model=model,
        identity=IDENTITY,
        original_window=window,
        lengths=lengths,
        tasks=tuple(tasks),
        variants=tuple(variants),
        rows=tuple(
            row
            for variant in variants
            for task in tasks
            for row in rows_of(variant, task, lengths, _of(records, variant.label, task))
        ),
        records=tuple(records),
        notes=(),
        results=folder / "results.jsonl",
    )
    write_sweep(result, folder)
    return result
