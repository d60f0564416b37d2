"""Tasks of lm-evaluation-harness (RULER and others) on a model under several methods.

One call of the harness for each length, since its `limit` would be spent on the first of several.
Everything else is the harness's own: prompts, generation settings (what a task leaves open comes
from the checkpoint, a repetition penalty too), metrics. Prompts are the same for every method.

    frame = run_lm_eval(model, tokenizer, ["niah_single_1"], [4096, 8192],
                        methods=["none", "yarn:2"], limit=50, out="runs/yarn")
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.errors import RunError, nearest
from longctx.files import write_whole
from longctx.fingerprint import identity_of, json_digest
from longctx.folders import refuse_other_than_file
from longctx.patch import Method
from longctx.prompts.rendering import templates
from longctx.schema import conform, parse
from longctx.weights import refuse_small_vocabulary

from .harness_lengths import refuse_endless
from .results.records import Record
from .results.schemas import StoredScores
from .results.store import Store
from .results.variants import Variant, variants_of
from .running.lengths import parse_lengths
from .tasks.shared.protocol import Observation

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Score", "run_lm_eval"]

_RESULTS = "lm_eval.jsonl"
_TABLES = ("lm_eval.csv", "lm_eval.parquet", "lm_eval.json")
_PROMPT_SEED, _SEED = 0, 1234  # the harness's own: Python's random, and all others
_BOOTSTRAP = 1000  # resamples, for metrics other than means
_ROOM = 1024  # tokens of a chat template and an answer, which may come on top of a task's length

_READ = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".parquet", ".txt")

_Load: TypeAlias = Callable[[str, int], list[Any]]


@dataclass(frozen=True, slots=True)
class Score:
    """A metric of one method, task and length."""

    method: str
    task: str
    length: int
    """Tokens that the task was told to fill, where it can."""
    metric: str
    """As the harness calls it; "score" for RULER's, which are called by their length there."""
    value: float
    stderr: float
    """Standard error of the mean, or as the harness gives it; NaN where there is none."""
    n: int
    """Documents that were asked."""


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    lengths: str | Iterable[int | str],
    *,
    methods: Sequence[Method | str | None] | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    chat: bool = False,
    include_path: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    replace: bool = False,
) -> pd.DataFrame:
    """Run tasks of lm-evaluation-harness under each method and length; a row for each `Score`.

    Args:
        model: from `longctx.load` or transformers, patched or not.
        tokenizer: its tokenizer.
        tasks: names that the harness knows; a group stands for its tasks.
        lengths: tokens, in any form that `parse_lengths` reads. Tasks get them as
            `max_seq_lengths`; those that do not ask for it are the same at each.
        methods: instances, or as the command line writes them; None alone by default.
        limit: documents per task and length; None takes all (500 in RULER).
        batch_size: prompts at a time.
        chat: put prompts into the tokenizer's chat template.
        include_path: folder of further tasks (YAML).
        out: folder for lm_eval.csv, .json and .parquet, and for lm_eval.jsonl, which an
            interrupted call goes on from.
        replace: let methods replace the RoPE scaling that the checkpoint ships with.

    Raises:
        RunError: no lm-eval, no such task, one that cannot be loaded, or another model's results.
        MethodError: a method that cannot be put on this model.
        ModelError: a tokenizer with ids beyond the model's embeddings.
    """
    release = _release()
    sizes, names = parse_lengths(lengths), _names(tasks)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise RunError(f"limit={limit}, batch_size={batch_size}: expected at least 1 each.")
    if chat and not tokenizer.chat_template:
        raise RunError("chat=True, but the tokenizer has no chat template: pass chat=False.")
    refuse_small_vocabulary(model, tokenizer)
    refuse_endless(names, sizes, tokenizer)
    variants = variants_of(model, methods, replace=replace)
    if pieces := [variant.label for variant in variants if variant.reading is not None]:
        raise RunError(f"lm-eval reads its prompts as a whole: {pieces[0]} is for longctx sweep.")
    identity = identity_of(model, tokenizer)
    folder = None if out is None else Path(out)
    if folder is not None:
        _refuse_lost(folder, {(v.label, n) for v in variants for n in sizes}, ("method", "length"))
    settings = [release, limit, chat, _digests(include_path, folder)]
    store = Store(None if folder is None else folder / _RESULTS, identity)
    scores: list[Score] = []
    try:
        with tempfile.TemporaryDirectory(prefix="longctx-tokenizer-") as saved:
            tokenizer.save_pretrained(saved)  # tasks load it by path to measure their prompts
            load = _loader(saved, include_path)
            for variant in variants:
                for length in sizes:
                    for name in names:
                        key = json_digest([identity, variant.record(), name, length, settings])
                        record = store.get(key)
                        if record is None:
                            begin = time.perf_counter()
                            loaded = load(name, length)
                            how = (variant, length, limit, batch_size, chat)
                            with variant.applied(model, replace=replace):
                                found = _evaluate(model, tokenizer, loaded, *how)
                            record = store.put(_record(key, variant, name, length, found, begin))
                        scores += [_score(o, store.path, key) for o in record.observations]
    finally:
        store.close()
    if folder is not None:
        _write_tables(
            folder, scores, {"lm_eval": release, "limit": limit, "chat": chat, **identity}
        )
    return _frame(scores)


def _release() -> str:
    try:
        return version("lm-eval")
    except PackageNotFoundError as error:
        raise RunError(
            "lm-evaluation-harness is not installed: pip install 'longctx-toolkit[lm-eval]'."
        ) from error


def _names(tasks: Sequence[str]) -> list[str]:
    names = dict.fromkeys([tasks] if isinstance(tasks, str) else tasks)
    if not names:
        raise RunError("no task: pass names that lm-eval knows, such as 'niah_single_1'.")
    return list(names)


def _digests(include_path: str | os.PathLike[str] | None, out: Path | None) -> dict[str, str]:
    """The user's task files by content, so that a changed task is not taken for the old one."""
    if include_path is None:
        return {}
    folder = Path(include_path)
    if not folder.is_dir():
        raise RunError(f"include_path {folder} is not a folder: expected one with tasks in YAML.")
    own = {} if out is None else {(out / name).resolve() for name in (_RESULTS, *_TABLES)}
    files = sorted(p for p in folder.rglob("*") if p.suffix in _READ and p.resolve() not in own)
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in files}


def _loader(tokenizer: str, include_path: str | os.PathLike[str] | None) -> _Load:
    """Load tasks, each once per length: RULER's write hundreds of prompts as they are loaded."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    @cache
    def manager(length: int) -> TaskManager:
        # Both names of the tokenizer: tasks look for either.
        metadata: Any = {"max_seq_lengths": [length], "tokenizer": tokenizer}
        return TaskManager(
            metadata={**metadata, "pretrained": tokenizer},
            include_path=None if include_path is None else str(include_path),
        )

    @cache
    def load(name: str, length: int) -> list[Any]:
        known = manager(length).all_tasks
        if name not in known:
            raise RunError(
                f"lm-eval knows no task {name!r}{nearest(name, known)}: `lm-eval ls tasks` lists "
                "them; pass include_path for your own."
            )
        random.seed(_PROMPT_SEED)
        np.random.seed(_SEED)
        try:
            return list(manager(length).load([name])["tasks"].values())
        except Exception as error:  # whatever a task's own code or its data set raises
            raise RunError(
                f"lm-eval cannot load task {name!r} at {length} tokens: "
                f"{type(error).__name__}: {error}"
            ) from error

    return load


def _evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    variant: Variant,
    length: int,
    limit: int | None,
    batch_size: int,
    chat: bool,
) -> list[Score]:
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports]

    harness: Any = lm_eval  # its annotations do not hold
    wrap: Any = huggingface.HFLM
    generates = all(task.OUTPUT_TYPE == "generate_until" for task in tasks)
    own = copy.deepcopy(tokenizer)  # it is given a padding token
    own.chat_template = templates(tokenizer)  # the same prompts on any day
    wrapped = wrap(
        pretrained=model,
        tokenizer=own,
        # Prompts beyond this lose their beginning, without an error. It is the size of the windows
        # in which rolling perplexity is measured, too.
        max_length=max(length, variant.window or 0) + (_ROOM if generates else 0),
        batch_size=batch_size,
    )
    # What `simple_evaluate` sets too; it also asks pip and git of their versions, which takes long.
    for task in tasks:
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    torch.manual_seed(_SEED)
    results: Any = harness.evaluate(
        wrapped,
        {"tasks": {task.task_name: task for task in tasks}, "groups": {}},
        limit=limit,
        bootstrap_iters=_BOOTSTRAP,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    return [
        Score(variant.label, name, length, *found, results["n-samples"][name]["effective"])
        for name, figures in results["results"].items()
        for found in _metrics(figures, results["samples"][name], length)
    ]


def _metrics(
    figures: dict[str, Any], samples: list[dict[str, Any]], length: int
) -> Iterable[tuple[str, float, float]]:
    """(metric, value, stderr) of one task, from keys such as "acc,none" and "acc_stderr,none"."""
    for key, value in figures.items():
        name, comma, kept = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if name.isdigit() and int(name) != length:  # RULER gives -1 for all other lengths
            continue
        each = [s[name] for s in samples if s.get("filter", "none") == kept and name in s]
        error = figures.get(f"{name}_stderr,{kept}")
        if not isinstance(error, int | float):
            error = _standard_error(each, float(value))
        metric = "score" if name.isdigit() else name
        yield metric if kept == "none" else f"{metric},{kept}", float(value), float(error)


def _standard_error(each: list[Any], value: float) -> float:
    """Of a mean over documents; NaN where the value is something else, or of one document."""
    if len(each) < 2 or not all(isinstance(one, int | float) for one in each):
        return math.nan
    if not math.isclose(sum(each) / len(each), value, abs_tol=1e-9):
        return math.nan
    return float(np.std(each, ddof=1) / math.sqrt(len(each)))


def _record(
    key: str, variant: Variant, task: str, length: int, scores: list[Score], begin: float
) -> Record:
    """A record of the sweep's store, each score as an observation: it keeps, locks and resumes.

    Their NLL is NaN: the harness gives none.
    """
    found = [Observation(length, s.metric, s.task, math.nan, 0, None, asdict(s)) for s in scores]
    seconds = round(time.perf_counter() - begin, 3)
    return Record(key, variant.label, task, (length,), 0, seconds, "lm-eval", tuple(found))


def _score(observation: Observation, path: Path | None, key: str) -> Score:
    where = f"{path}, record {key}"
    return conform(observation.detail, Score, where, next_step="Delete that line, or name another.")


def _frame(scores: list[Score]) -> pd.DataFrame:
    """A row for each score."""
    import pandas as pd

    columns = [field.name for field in fields(Score)]
    return pd.DataFrame([asdict(score) for score in scores], columns=columns)


def _refuse_lost(folder: Path, wanted: set[tuple[Any, ...]], names: tuple[str, ...]) -> None:
    """Refuse to replace tables that hold what the new ones would not.

    Args:
        folder: where they are.
        wanted: what the new ones hold: a value for each of `names` in each row.
        names: columns.

    Raises:
        RunError: it names the first that would be lost.
    """
    path = folder / _TABLES[-1]
    for name in _TABLES:
        refuse_other_than_file(folder / name)
    if not path.exists():
        return
    stored = parse(path.read_bytes(), StoredScores, path, next_step="Name another folder.")
    there = {tuple(getattr(row, name) for name in names) for row in stored.rows}
    if lost := sorted(there - wanted):
        raise RunError(
            f"{folder} holds tables with {', '.join(map(str, lost[0]))} ({', '.join(names)}), "
            "which these would not: ask for it too (known results are not computed again), or name "
            "another folder."
        )


def _write_tables(folder: Path, scores: list[Score], about: dict[str, Any]) -> None:
    """Write all of `_TABLES`.

    Raises:
        RunError: those that are there hold more.
    """
    _refuse_lost(
        folder, {(s.method, s.task, s.length) for s in scores}, ("method", "task", "length")
    )
    frame = _frame(scores)
    rows = frame.astype(object).where(frame.notna(), None).to_dict(orient="records")
    text = json.dumps({**about, "rows": rows}, indent=1, allow_nan=False)
    write_whole(folder / _TABLES[0], lambda path: frame.to_csv(path, index=False))
    write_whole(folder / _TABLES[1], lambda path: frame.to_parquet(path, index=False))
    write_whole(folder / _TABLES[2], lambda path: path.write_text(text, encoding="utf-8"))
