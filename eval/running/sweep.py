"""One model, several methods, tasks and lengths: every cell measured once, on the same prompts.

result = sweep(model, tokenizer, ["passkey", Perplexity(last=256)], "1k:16k",
               methods=["none", "yarn:2"], results="runs/yarn/results.jsonl")
print_sweep(result); write_sweep(result, "runs/yarn")
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.errors import DataError, ModelError, RunError
from longctx.fingerprint import identity_of
from longctx.model import learned_positions
from longctx.patch import Method
from longctx.reading.read import Reading
from longctx.scoring.compressed_caches import CacheLike
from longctx.scoring.over_cache import full_cache_bytes
from longctx.weights import refuse_small_vocabulary

from ..reporting.files import refuse_lost_cells
from ..results.store import Store
from ..results.sweep_result import Row, SweepResult, cell_key, rows_of
from ..results.variants import Variant, original_window, variants_of, with_caches
from ..results.verification import notes_of
from ..tasks.shared.adaptive import Adaptive
from ..tasks.shared.protocol import OverCache, Plan, Task
from ..tasks.shared.registry import available_tasks, parse_task
from ..tasks.shared.retrieval import Retrieval
from .lengths import parse_lengths
from .progress import Progress
from .runner import Job, Ranks, SweepRunner, UnitRunner, notes_before

__all__ = ["sweep"]


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task | str] | Task | str,
    lengths: int | str | Iterable[int | str],
    *,
    methods: Sequence[Method | Reading | str | None] | str | None = None,
    caches: Sequence[CacheLike] | CacheLike = None,
    results: str | os.PathLike[str] | None = None,
    batch_tokens: int = 16_384,
    verify: int = 0,
    adaptive: Adaptive | None = None,
    replace: bool = False,
    overwrite: bool = False,
    single_process: bool = False,
    progress: bool = True,
) -> SweepResult:
    """Measure a model under several methods over lengths.

    Each method is put on the same model object and taken off again. Prompts do not depend on the
    method. Where a method is `length_invariant`, one pass may serve all lengths. What runs out of
    memory is tried with half the batch down to a single prompt, then recorded as failed.

    Under `torchrun` or `accelerate launch` the processes share the work; each returns the whole
    result.

    Args:
        model: from `longctx.load` or transformers, patched or not.
        tokenizer: its tokenizer.
        tasks: instances of yours or of longctx, or as the command line writes them ("needle",
            "needle:samples=5").
        lengths: tokens, in any form that `parse_lengths` reads. A length beyond the window is
            measured and flagged.
        methods: instances, or as the command line writes them ("yarn:8"; "none" or None is the
            model as it came; "read:map" that model, reading retrieval prompts in pieces); None
            alone by default.
        caches: what contexts are kept in, each under each method: instances or presses of kvpress,
            or as the command line writes them ("quantized:4", "sliding:512"; "full" or None is the
            model's own); the full cache alone by default.
        results: JSON lines to append each result to, and to take those from that are there.
        batch_tokens: tokens that are forwarded at a time at most, if that is one prompt or more.
        verify: so many answers per method and task that has answers are generated too, each prompt
            by itself; what comes out otherwise than it was scored is told in the notes.
        adaptive: stop asking a retrieval cell once it is decided, and find by bisection how far
            the model reads; None asks every prompt of every cell.
        replace: let methods replace the RoPE scaling that the checkpoint ships with.
        overwrite: go on although the folder of `results` holds a report with cells that this
            sweep lacks, so that `write_sweep` to it needs `overwrite` too.
        single_process: this process runs all of it, whatever others were started with it; in
            training, say.
        progress: show a bar with the remaining time on stderr; where that is not a terminal, a line
            every 30 seconds.

    Raises:
        RunError: lengths, tasks, caches or a results file that do not fit, or no room on the disk.
        DataError: a length too short or too long for a task.
        MethodError: a method that cannot be put on this model.
        ModelError: a length beyond a table of learned positions, or a tokenizer with ids beyond
            the model's embeddings.
    """
    sizes = parse_lengths(lengths)
    chosen = _tasks(tasks)
    for name, value, least in (("batch_tokens", batch_tokens, 1), ("verify", verify, 0)):
        if type(value) is not int or value < least:
            raise RunError(f"{name}={value!r}: expected a whole number, {least} or more.")
    if adaptive is not None and not hasattr(adaptive, "decide"):
        raise RunError(f"adaptive={adaptive!r}: expected an Adaptive(threshold=0.8, …) or None.")
    if adaptive is not None:
        _refuse_fixed_prompts(chosen)
    _refuse_beyond_table(model, sizes)
    refuse_small_vocabulary(model, tokenizer)
    identity = identity_of(model, tokenizer)
    own = variants_of(model, methods, replace=replace)
    variants = with_caches(model, own, caches, replace=replace)
    invariants = {variant.length_invariant for variant in variants}
    ranks = Ranks() if single_process else Ranks.here()
    plans = _plans(chosen, tokenizer, sizes, invariants, progress=progress and ranks.first)
    _refuse_reading(variants, chosen, tokenizer, sizes)
    _refuse_over_cache(variants, chosen, tokenizer, plans)
    jobs = [
        Job(variant, task, plans[task.name, variant.length_invariant])
        for variant in variants
        for task in chosen
    ]
    path = None if results is None else Path(results)
    if path is not None and not overwrite:
        cells = [
            cell_key(v.label, task, n, adaptive) for v in variants for task in chosen for n in sizes
        ]
        refuse_lost_cells(path.parent, identity, cells)
    if ranks.ranks > 1 and path is None:
        raise RunError(
            f"{ranks.ranks} processes share this sweep: pass `results`, the file that they meet in "
            "(or `single_process`, for each to run all of it)."
        )
    store = Store(path, identity, rank=ranks.rank, ranks=ranks.ranks)
    try:
        unit_runner = UnitRunner(model, tokenizer, store, batch_tokens)
        runner = SweepRunner(unit_runner, sizes, adaptive, ranks)
        runner.measure(jobs, replace=replace, progress=progress)
        ranks.wait()
        store.reload()
        collected = {(job.variant.label, job.task.name): runner.collect(job) for job in jobs}
        checks = [runner.check(job, verify, replace=replace) for job in jobs if ranks.first]
        ranks.wait()
    finally:
        store.close()
    verified = tuple(check for check in checks if check is not None)
    trained = original_window(model)
    notes = [
        *store.notes,
        *notes_before(jobs),
        *(note for _, said in collected.values() for note in said),
        *notes_of(verified),
        *_notes_on_caches(variants, verify),
    ]
    rows = [
        row
        for job in jobs
        for row in rows_of(
            job.variant,
            job.task,
            sizes,
            collected[job.variant.label, job.task.name][0],
            adaptive,
            original_window=trained,
        )
    ]
    return SweepResult(
        model=_name(model),
        identity=identity,
        original_window=trained,
        lengths=sizes,
        tasks=tuple(chosen),
        variants=tuple(variants),
        rows=tuple(_with_full_caches(model, variants, rows, replace=replace)),
        records=tuple(record for found, _ in collected.values() for record in found),
        notes=tuple(dict.fromkeys(notes)),
        results=path,
        verified=verified,
        adaptive=adaptive,
    )


def _name(model: PreTrainedModel) -> str:
    """Its hub id, the name of its folder, or its type."""
    name: str = model.name_or_path or model.config.model_type
    return Path(os.path.abspath(name)).name if Path(name).is_dir() else name


def _tasks(tasks: Sequence[Task | str] | Task | str) -> list[Task]:
    chosen: list[Task] = []
    for task in [tasks] if isinstance(tasks, str | Task) else tasks:
        if isinstance(task, str):
            task = parse_task(task)
        if isinstance(task, type) or not hasattr(task, "plan"):
            raise RunError(
                f"{task!r} is not a task: pass an instance, or a name of "
                f"{', '.join(available_tasks())}."
            )
        if task.name in [other.name for other in chosen]:
            raise RunError(f"task {task.name!r} is asked for twice: one sweep for each setting.")
        chosen.append(task)
    if not chosen:
        raise RunError(f"no task to sweep: pass some of {', '.join(available_tasks())}.")
    return chosen


def _plans(
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    invariants: set[bool],
    *,
    progress: bool,
) -> dict[tuple[str, bool], Plan]:
    """The work by task and by whether its method is length-invariant; all that is wrong at once."""
    found: dict[tuple[str, bool], Plan] = {}
    wrong: dict[str, None] = {}
    with Progress(len(tasks) * len(invariants), shown=progress) as bar:
        for task, invariant in product(tasks, invariants):
            bar.at(f"prompts of {task.name}")  # thousands of long ones take minutes to build
            try:
                plan = task.plan(tokenizer, lengths, length_invariant=invariant)
            except DataError as error:
                wrong[f"task {task.name}: {error}"] = None
            else:
                found[task.name, invariant] = plan
            bar.advance(1)
    if wrong:
        raise DataError("\n".join(wrong))
    return found


def _refuse_fixed_prompts(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if isinstance(task, Retrieval) and not task.draws_prompts:
            raise DataError(
                f"task {task.name}: the prompts of a file cannot be asked one by one until a "
                "length is decided: leave out `adaptive`, or the file."
            )


def _refuse_reading(
    variants: Sequence[Variant],
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
) -> None:
    """Refuse tasks whose prompts do not say what is document and what is question."""
    reading = [variant.label for variant in variants if variant.reading is not None]
    for task in tasks if reading else ():
        if isinstance(task, Retrieval):
            spec = task.prompt_spec(0, max(lengths), max(lengths))
            if task.prompt(tokenizer, max(lengths), spec).document is not None:
                continue
        raise RunError(
            f"{reading[0]} asks a document a question, and the prompts of task {task.name} are "
            "not such: name tasks with a haystack alone (--tasks passkey needle), or leave it out."
        )


def _refuse_over_cache(
    variants: Sequence[Variant],
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    plans: Mapping[tuple[str, bool], Plan],
) -> None:
    """Refuse tasks whose inputs do not say what is context and what is read after it."""
    cached = [variant.label for variant in variants if variant.cache is not None]
    for task in tasks if cached else ():
        why: str | None = "it does not say what is context and what is read after it"
        if isinstance(task, OverCache):
            first = plans[task.name, False].units[0]  # the others are of its kind
            why = task.cache_obstacle(tokenizer, first)
        if why is not None:
            raise RunError(
                f"{cached[0]}: task {task.name} cannot be read over a compressed cache: {why}. "
                "Leave it out, or sweep it with the full cache (--caches full)."
            )


def _notes_on_caches(variants: Sequence[Variant], verify: int) -> list[str]:
    kinds = dict.fromkeys(str(variant.cache) for variant in variants if variant.cache is not None)
    if not kinds:
        return []
    notes = [
        f"caches ({', '.join(kinds)}): a context is prefilled without the question and compressed, "
        "and question and answer are read over what is left of it"
    ]
    if verify:
        notes.append("answers over compressed caches are decoded step by step: none was verified")
    return notes


def _with_full_caches(
    model: PreTrainedModel, variants: Sequence[Variant], rows: Sequence[Row], *, replace: bool
) -> list[Row]:
    """Say of rows with the full cache what it holds, where others have less."""
    full = [variant for variant in variants if variant.cache is None and variant.reading is None]
    if len(full) == len(variants):
        return [*rows]
    sizes: dict[tuple[str, int], int | None] = {}
    for variant in full:
        with variant.applied(model, replace=replace):
            for length in {row.length for row in rows}:
                # The last token of an answer is not read.
                sizes[variant.label, length] = full_cache_bytes(model, length - 1)
    return [
        dataclasses.replace(row, cache_bytes=sizes.get((row.method, row.length), row.cache_bytes))
        for row in rows
    ]


def _refuse_beyond_table(model: PreTrainedModel, lengths: Sequence[int]) -> None:
    limit = learned_positions(model)
    if limit is not None and max(lengths) > limit:
        raise ModelError(
            f"a length of {max(lengths)} tokens is beyond the {limit} learned positions of model "
            f"type {model.config.model_type!r}: ask for at most {limit}."
        )
