"""Divisors of longrope for one model and one length, found by how well keys are said.

    found = search(model, tokenizer, 1024, folder="runs/search")
    longctx.extend(model, found.method)

Perplexity is the wrong guide: divisors that were found by it read near text better and lose keys
(LongRoPE2, arXiv:2502.20082, section 3.2, goes by the tokens of needles for that reason).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.core import extend
from longctx.errors import MethodError, RunError
from longctx.files import finite, write_whole
from longctx.fingerprint import identity_of, json_digest
from longctx.model import rope_of
from longctx.patch import Method, patch_of
from longctx.prompts.haystacks import held_in

from ..running.progress import Progress
from ..tasks.shared.texts import texts_of
from .evaluations import Evaluations
from .evolution import Divisors, Evolution, known_divisors
from .objective import KeyLoss, key_prompts
from .settings import SearchSettings

__all__ = ["FoundDivisors", "search", "write_found"]

_FRESH = 1000  # added to the seed for the prompts that judge the finalists


@dataclass(frozen=True, slots=True)
class FoundDivisors:
    """What a search came to."""

    method: Method
    """longrope, ready for `longctx.extend`."""
    fields: Mapping[str, Any]
    """Its fields, as a file has them."""
    loss: float
    """Of the best, on the finalists' prompts, in nats per token of the key."""
    known_losses: Mapping[str, float]
    """Of the formulas of other methods (none, linear, ntk, yarn), on the same prompts."""
    evaluations: int
    """Divisors that were tried, each on all prompts."""
    seconds: float
    """By the clock, without what an earlier, interrupted search had done."""
    settings: SearchSettings


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: int,
    *,
    settings: SearchSettings | None = None,
    folder: str | os.PathLike[str] | None = None,
    batch_tokens: int = 16_384,
    replace: bool = False,
    progress: bool = True,
) -> FoundDivisors:
    """Search the divisors of longrope for a window of `target` tokens.

    Args:
        model: from `longctx.load` or transformers, without a method on it.
        tokenizer: its tokenizer.
        target: the new window, in tokens.
        settings: how long to search and by what to judge.
        folder: where losses are written as they come; the same call goes on from those.
        batch_tokens: tokens that are forwarded at a time at most, if that is one prompt or more.
        replace: let the RoPE scaling that the checkpoint ships with be replaced.
        progress: show a bar on stderr; where that is not a terminal, a line every 30 seconds.

    Raises:
        MethodError: a method in place, scaled RoPE without `replace`, a model without RoPE.
        RunError: a target within the window, a folder of another search, or no loss that is a
            number.
        DataError: a target that is too long for the text, or a window too short for a prompt.
    """
    settings = settings or SearchSettings()
    if patch_of(model) is not None:
        raise MethodError("a search starts from the model as it came: remove its method first.")
    rope = rope_of(model)
    if type(target) is not int or target <= rope.length:
        raise RunError(
            f"target={target!r}: expected more tokens than the model's window, {rope.length:,}."
        )
    factor = target / rope.length
    known = known_divisors(rope, factor)
    losses = {
        seed: _key_loss(tokenizer, rope.length, target, settings, seed, batch_tokens)
        for seed in (settings.seed, settings.seed + _FRESH)
    }
    header = {**identity_of(model, tokenizer), "target": target, **dataclasses.asdict(settings)}
    header["text"] = _digest(losses.values())  # what the files say now
    path = None if folder is None else Path(folder) / "evaluations.jsonl"
    begin = time.perf_counter()
    steps = settings.evaluations + settings.finalists + len(known)
    with (
        Evaluations(path, header) as evaluations,
        Progress(steps, shown=progress) as bar,
    ):

        def judge(candidate: Divisors, seed: int) -> float:
            name = "first" if seed == settings.seed else "fresh"
            loss = evaluations.get(candidate, name)
            if loss is None:
                method = candidate.method(factor)
                with extend(model, method, replace=replace, prove_effect=False):
                    loss = losses[seed](model)
                loss = math.inf if math.isnan(loss) else loss  # nothing is less than NaN
                evaluations.put(candidate, name, loss)
            return loss

        evolution = Evolution(known, factor, population=settings.population, seed=settings.seed)
        bar.at("divisors of known methods")
        for candidate in _first(evolution.candidates(), settings.evaluations):
            evolution.tell(candidate, judge(candidate, settings.seed))
            best = evolution.losses[evolution.best(1)[0]]
            bar.at(f"{len(evolution.losses)} divisors tried, the best at {best:.3f} nats")
            bar.advance(1)
        fresh: dict[Divisors, float] = {}
        for finalist in evolution.best(settings.finalists):
            bar.at("finalists")
            fresh[finalist] = judge(finalist, settings.seed + _FRESH)
            bar.advance(1)
        for candidate in known.values():
            bar.at("known methods on the finalists' prompts")
            fresh[candidate] = judge(candidate, settings.seed + _FRESH)
            bar.advance(1)
    best = min(fresh, key=fresh.__getitem__)
    if not math.isfinite(fresh[best]):
        raise RunError(
            "the model's logits are NaN or infinite under all divisors, and under none: load it in "
            "another precision (--dtype float32)."
        )
    return FoundDivisors(
        method=best.method(factor),
        fields=best.fields(factor),
        loss=fresh[best],
        known_losses={name: fresh[candidate] for name, candidate in known.items()},
        evaluations=len(evolution.losses),
        seconds=time.perf_counter() - begin,
        settings=settings,
    )


def write_found(found: FoundDivisors, path: Path, *, overwrite: bool = False) -> Path:
    """Write what `longrope:@PATH` reads, with where it comes from beside it.

    A file with these very divisors stays as it is.

    Raises:
        RunError: the file is there with something else, without `overwrite`; or the disk refuses.
    """
    content: Any = {
        "method": found.method.name,
        "fields": dict(found.fields),
        "search": {
            "loss": found.loss,
            "known_losses": dict(found.known_losses),
            "evaluations": found.evaluations,
            "seconds": round(found.seconds, 1),
            "settings": dataclasses.asdict(found.settings),
        },
    }
    if path.exists() and not overwrite:
        if _fields_of(path) == json.loads(json.dumps(content["fields"])):
            return path
        raise RunError(f"{path} is there: name another, or pass overwrite to replace it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(
            path, lambda part: part.write_text(json.dumps(finite(content), indent=1) + "\n")
        )
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}. Name another.") from error


def _fields_of(path: Path) -> Any:
    """The fields that a file of a search holds, None for any other file."""
    try:
        found: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found.get("fields") if isinstance(found, dict) else None


def _key_loss(
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    target: int,
    settings: SearchSettings,
    seed: int,
    batch_tokens: int,
) -> KeyLoss:
    text = texts_of(settings.text) if settings.text else held_in()

    def prompts(length: int, count: int) -> tuple[Any, ...]:
        return tuple(key_prompts(tokenizer, length, count, text=text, seed=seed))

    return KeyLoss(
        far=prompts(target, settings.prompts),
        near=prompts(window, settings.near_prompts),
        near_weight=settings.near_weight,
        batch_tokens=batch_tokens,
    )


def _digest(losses: Iterable[KeyLoss]) -> str:
    """Of all prompts, whose text may be another than when a search was cut off."""
    return json_digest([each.input_ids for one in losses for each in (*one.far, *one.near)])


def _first(candidates: Iterator[Divisors], count: int) -> Iterator[Divisors]:
    for _, candidate in zip(range(count), candidates, strict=False):
        yield candidate
