"""Preparing conversations against the tokenizer alone: `python -m benchmarks.preparing`.

The ShareGPT file of the tests marked `real` and SmolLM2's tokenizer, both in $LONGCTX_REAL. The
baseline tokenises the finished samples, all at once; `prepare` reads, parses, renders, tokenises,
labels and counts. The file is taken in parts, each by both in turns, so that a busy machine slows
both. A core's rate is tokens per second of CPU time, over all threads.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
from transformers import AutoTokenizer

from longctx.gguf import convert_gguf
from longctx.train.data.preparation import TokenizeSettings, prepare
from longctx.train.data.readers import Records

from ._measure import write_results

ROOT = Path(os.environ.get("LONGCTX_REAL", Path.home() / ".cache/longctx-real"))
SHAREGPT = ROOT / "sharegpt" / "sharegpt_truncated.json"
GGUF = ROOT / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PART = 1_800  # records


def main() -> None:
    """Measure, or say what is missing."""
    if not (SHAREGPT.exists() and GGUF.exists()):
        print(f"skipped: no {SHAREGPT} and {GGUF}")
        return
    datasets.disable_progress_bars()
    tokenizer: Any = AutoTokenizer.from_pretrained(convert_gguf(GGUF))
    with TemporaryDirectory() as folder:
        found = np.array(
            [
                _measured(tokenizer, path, ours_first=bool(number % 2))
                for number, path in enumerate(_parts(Path(folder)))
            ]
        )
    tokens, raw_wall, raw_cpu, wall, cpu = found.T
    write_results(
        "Preparing conversations",
        "python -m benchmarks.preparing",
        [
            {
                "tokens": f"{tokens.sum():,.0f}",
                "tokenizer alone, tokens/s of a core": f"{tokens.sum() / raw_cpu.sum():,.0f}",
                "prepare, tokens/s of a core": f"{tokens.sum() / cpu.sum():,.0f}",
                "of a core [parts]": _share(raw_cpu, cpu),
                "prepare, tokens/s": f"{tokens.sum() / wall.sum():,.0f}",
                "by the clock [parts]": _share(raw_wall, wall),
            }
        ],
        f"{len(found)} parts of {PART:,} records, each by both in turns; in brackets the smallest "
        "and the largest ratio of a part.",
    )


def _share(base: Any, ours: Any) -> str:
    parts = base / ours
    return f"{base.sum() / ours.sum():.2f} [{parts.min():.2f}, {parts.max():.2f}]"


def _parts(folder: Path) -> Iterator[Path]:
    for number, part in enumerate(_batches(Records(SHAREGPT, salvage=True))):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in part), encoding="utf-8")
        yield path


def _batches(records: Records) -> Iterator[list[Any]]:
    rest = iter(records)
    while part := list(islice(rest, PART)):
        yield part


def _measured(tokenizer: Any, path: Path, ours_first: bool) -> tuple[float, ...]:
    """Tokens; seconds by the clock and of CPU, of the tokenizer alone and of `prepare`."""
    settings = TokenizeSettings(max_length=16_384)
    first = prepare(path, tokenizer, settings)
    texts = tokenizer.batch_decode(first.dataset["input_ids"][:])
    ours = _seconds(lambda: prepare(path, tokenizer, settings)) if ours_first else None
    raw = _seconds(lambda: tokenizer(texts, add_special_tokens=False, verbose=False))
    ours = ours or _seconds(lambda: prepare(path, tokenizer, settings))
    return (float(first.report.kept), *raw, *ours)


def _seconds(call: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
