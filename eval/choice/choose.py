"""Choose a method for one model and one length by measuring candidates on it.

    choice = choose(model, tokenizer, 1024, folder="runs/choice")
    print(choice.recommended, choice.reason)

Candidates are screened by few prompts, and those that are left are compared on prompts that the
screening did not see: the best of many on the prompts that made it the best would look better than
it is.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.errors import RunError
from longctx.patch import patch_of

from ..comparison.differences import Difference, nll, pair, pooled_answers
from ..results.sweep_result import SweepResult
from ..results.variants import Variant, original_window
from ..running.sweep import sweep
from ..stats.intervals import wilson
from ..tasks.perplexity import Perplexity
from ..tasks.shared.protocol import Observation
from ..tasks.shared.registry import parse_task
from ..tasks.shared.retrieval import Retrieval
from .candidates import default_candidates, usable
from .settings import ChoiceSettings

__all__ = ["Choice", "Finalist", "choose", "recommend"]

_LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Finalist:
    """A candidate in the comparison."""

    label: str
    """As the command line writes it."""
    found: int
    """Keys found at the lengths beyond the old window."""
    asked: int
    low: float
    """Wilson's 95% interval of the share found, as if all prompts were independent."""
    high: float
    behind: Difference | None
    """Share found minus that of the best, on the same prompts; None for the best itself."""
    gain: Difference | None
    """Share found minus that of the model as it came, on the same prompts; None for that itself."""
    perplexity: Difference | None
    """NLL per token inside the old window, minus that of the model as it came; None where it reads
    in pieces and changes nothing there, and for the model as it came."""
    seconds: float
    """For all prompts of the comparison, as the sweep ran them."""
    plain: bool
    """Whether plain transformers loads what `longctx.save` writes."""
    in_pieces: bool
    """Whether documents are read in pieces."""

    @property
    def contends(self) -> bool:
        """Whether the data do not tell it from the best."""
        return self.behind is None or not self.behind.p_value < _LEVEL

    @property
    def costs(self) -> bool:
        """Whether a higher perplexity inside the old window was shown."""
        one = self.perplexity
        return one is not None and one.value > 0 and one.p_value < _LEVEL


@dataclass(frozen=True, slots=True)
class Choice:
    """What was found."""

    model: str
    window: int
    """Of the model as it came, in tokens."""
    target: int
    recommended: str
    """A candidate as it was given; "none" if nothing was shown to read further than that."""
    reason: str
    finalists: tuple[Finalist, ...]
    """Most keys first; the model as it came is among them."""
    dropped: Mapping[str, str]
    """Candidates that were dropped, and why."""
    keys: SweepResult
    """The comparison's prompts."""
    inside: SweepResult
    """Perplexity inside the old window."""


def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: int,
    *,
    candidates: Sequence[str] | None = None,
    settings: ChoiceSettings | None = None,
    folder: str | os.PathLike[str] | None = None,
    batch_tokens: int = 16_384,
    replace: bool = False,
    progress: bool = True,
) -> Choice:
    """Choose a method for `model` at `target` tokens.

    One is recommended only if it was shown to find more keys than the model as it came, at a level
    of 5% divided by the candidates compared (Bonferroni), since the best is picked by the same
    prompts. Most keys count first. Of such candidates that cannot be told from the best, one that
    plain transformers loads is preferred to one that `longctx.load` restores, and this to reading
    in pieces; then one without a shown cost inside the old window; then the one with most keys.

    Args:
        model: from `longctx.load` or transformers, without a method on it.
        tokenizer: its tokenizer.
        target: the window that is wanted, in tokens.
        candidates: methods as the command line writes them; None for `default_candidates`.
        settings: how many prompts.
        folder: where results are written as they come; the same call goes on from those.
        batch_tokens: tokens that are forwarded at a time at most, if that is one prompt or more.
        replace: let candidates replace the RoPE scaling that the checkpoint ships with.
        progress: show a bar on stderr; where that is not a terminal, a line every 30 seconds.

    Raises:
        RunError: a target within the window, no usable candidate, a task without right answers, a
            method in place, or a folder of another model.
        DataError: a target that is too long for the task's text.
    """
    settings = settings or ChoiceSettings()
    trained = original_window(model)
    if patch_of(model) is not None:
        raise RunError("a choice starts from the model as it came: remove its method first.")
    if trained is None or type(target) is not int or target <= trained:
        raise RunError(
            f"target={target!r}: expected more tokens than the model's window, {trained}."
        )
    wanted = default_candidates(trained, target) if candidates is None else tuple(candidates)
    if twice := next((name for name in wanted if wanted.count(name) > 1), None):
        raise RunError(f"candidate {twice!r} is named twice: leave one out.")
    fine, dropped = usable(model, [c for c in wanted if c != "none"], replace=replace)
    if not fine:
        said = "; ".join(f"{name}: {why}" for name, why in dropped.items())
        raise RunError(f"no candidate can be put on this model ({said}).")
    middle = round(math.sqrt(trained * target))
    beyond = (middle, target) if middle > trained + trained // 4 else (target,)
    place = None if folder is None else Path(folder)

    def swept(
        part: str, methods: Sequence[str], task: Retrieval, lengths: Sequence[int]
    ) -> SweepResult:
        return sweep(
            model,
            tokenizer,
            [task],
            lengths,
            methods=methods,
            results=None if place is None else place / part / "results.jsonl",
            batch_tokens=batch_tokens,
            replace=replace,
            overwrite=True,
            progress=progress,
        )

    first = swept("first", [*fine.values()], _task(settings, settings.first_samples, 1), (target,))
    left = _screened(first, dropped, len(fine))
    screening = swept(
        "screening",
        [fine[label] for label in left],
        _task(settings, settings.screening_samples, 2),
        beyond,
    )
    left = _screened(screening, dropped, settings.finalists)
    finals = ["none", *(fine[label] for label in left)]
    keys = swept("keys", finals, _task(settings, settings.samples, 0), (trained, *beyond))
    inside = sweep(
        model,
        tokenizer,
        [Perplexity(windows=settings.windows)],
        [trained],
        methods=[method for method in finals if not method.startswith("read:")],
        results=None if place is None else place / "inside" / "results.jsonl",
        batch_tokens=batch_tokens,
        replace=replace,
        overwrite=True,
        progress=progress,
    )
    finalists = _finalists(keys, inside, beyond, dropped)
    taken, reason = recommend(finalists)
    return Choice(
        model=keys.model,
        window=trained,
        target=target,
        recommended=fine.get(taken, taken),
        reason=reason,
        finalists=tuple(finalists),
        dropped=dropped,
        keys=keys,
        inside=inside,
    )


def _task(settings: ChoiceSettings, samples: int, turn: int) -> Retrieval:
    """The task with so many prompts; another turn has other prompts."""
    task = parse_task(settings.task)
    if not isinstance(task, Retrieval) or not task.draws_prompts:
        raise RunError(
            f"task={settings.task!r}: expected one that draws prompts with one right answer each, "
            "such as passkey, needle or multi_key."
        )
    return dataclasses.replace(task, samples=samples, seed=3 * settings.seed + turn)


def _screened(result: SweepResult, dropped: dict[str, str], most: int) -> list[str]:
    """The methods that may still be the best, at most so many; the others go to `dropped`.

    A method is ruled out where its interval ends before that of the best begins, and where it
    could not be asked what the others were (memory, NaN). Of those that
    plain transformers loads, one stays if any is left and there is room beside the best.

    Raises:
        RunError: none of them could be measured.
    """
    counted = {v.label: _counted(result, v.label, result.lengths) for v in result.variants}
    asked = max(1, *(own.asked for own in counted.values()))
    order = sorted(  # one that failed at a length has answered the easier prompts alone
        counted,
        key=lambda label: (counted[label].asked == asked, counted[label].share),
        reverse=True,
    )
    best = counted[order[0]]

    def said(label: str) -> str:
        own = counted[label]
        return (
            f"{own.found} of {own.asked} keys in the screening, where {order[0]} found "
            f"{best.found} of {best.asked}"
        )

    left: list[str] = []
    for label in order:
        own = counted[label]
        if own.asked < asked:
            dropped[label] = _unmeasured(result, label, own.asked, asked)
        elif own.interval[1] < best.interval[0]:
            dropped[label] = said(label)
        else:
            left.append(label)
    if not left:
        why = "; ".join(f"{label}: {dropped[label]}" for label in order)
        raise RunError(f"no candidate could be measured ({why}).")
    plain = {variant.label for variant in result.variants if _plain(variant)}
    kept = left[:most]
    if most > 1 and not plain.intersection(kept):  # the choice prefers one
        kept[most - 1 :] = [label for label in left if label in plain][:1] or kept[most - 1 :]
    dropped |= {label: said(label) for label in left if label not in kept}
    return kept


def _unmeasured(result: SweepResult, label: str, done: int, asked: int) -> str:
    """Why a method cannot be held against those that answered all prompts."""
    failures = (row.failed for row in result.rows if row.method == label and row.failed)
    return f"measured at {done} of {asked} prompts only: {next(failures, 'NaN in the logits')}"


@dataclass(frozen=True, slots=True)
class _Counted:
    """Right answers, and of how many."""

    found: int
    asked: int

    @property
    def share(self) -> float:
        """Below any other where nothing could be asked."""
        return self.found / self.asked if self.asked else -1.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, as if all prompts were independent."""
        return wilson(self.found, self.asked) if self.asked else (math.nan, math.nan)


def _counted(result: SweepResult, label: str, lengths: Sequence[int]) -> _Counted:
    answers = [o.correct for o in _observed(result, label, lengths).values()]
    return _Counted(sum(map(bool, answers)), sum(answer is not None for answer in answers))


def _observed(result: SweepResult, label: str, lengths: Sequence[int]) -> dict[str, Observation]:
    """What was observed by length and item."""
    return {
        f"{o.length}/{o.item}": o
        for record in result.records
        if record.method == label and not record.failed
        for o in record.observations
        if o.length in lengths
    }


def _finalists(
    keys: SweepResult, inside: SweepResult, beyond: Sequence[int], dropped: dict[str, str]
) -> list[Finalist]:
    """The methods of the comparison, most keys first; those without all figures go to `dropped`.

    Raises:
        RunError: the model as it came has not all of them.
    """
    counted = {v.label: _counted(keys, v.label, beyond) for v in keys.variants}
    read = {v.label: _read(inside, v.label) for v in keys.variants}
    asked = max(1, *(own.asked for own in counted.values()))
    windows = max(1, *read.values())
    whole: list[Variant] = []
    for variant in keys.variants:
        label, why = variant.label, ""
        if counted[label].asked < asked:
            why = _unmeasured(keys, label, counted[label].asked, asked)
        elif variant.reading is None and read[label] < windows:
            why = "perplexity inside the old window: " + _unmeasured(
                inside, label, read[label], windows
            )
        if why and label == "none":
            raise RunError(f"the model as it came cannot be compared with: {why}.")
        if why:
            dropped[label] = why
        else:
            whole.append(variant)
    order = sorted(whole, key=lambda v: counted[v.label].share, reverse=True)
    best = _observed(keys, order[0].label, beyond)
    unchanged = _observed(keys, "none", beyond)
    came = _observed(inside, "none", inside.lengths)
    found: list[Finalist] = []
    for variant in order:
        count = counted[variant.label]
        own = _observed(keys, variant.label, beyond)
        text = _observed(inside, variant.label, inside.lengths)
        same = variant is order[0]
        found.append(
            Finalist(
                label=variant.label,
                found=count.found,
                asked=count.asked,
                low=count.interval[0],
                high=count.interval[1],
                behind=None if same else pooled_answers(pair(best, own)),
                gain=None if variant.label == "none" else pooled_answers(pair(unchanged, own)),
                perplexity=nll(pair(came, text)) if text and variant.label != "none" else None,
                seconds=sum(row.seconds for row in keys.rows if row.method == variant.label),
                plain=_plain(variant),
                in_pieces=variant.reading is not None,
            )
        )
    return found


def _read(inside: SweepResult, label: str) -> int:
    """Windows of text whose perplexity is a number."""
    found = _observed(inside, label, inside.lengths).values()
    return sum(math.isfinite(o.nll) for o in found)


def _plain(variant: Variant) -> bool:
    """Whether a checkpoint says all of it in its config."""
    return variant.reading is None and all(method.plain_loadable for method in variant.methods)


def recommend(finalists: Sequence[Finalist]) -> tuple[str, str]:
    """The method to take, and why."""
    best = finalists[0]
    none = next(one for one in finalists if one.label == "none")
    # The best of several is picked by the same prompts: each of them has had its chance.
    level = _LEVEL / max(1, len(finalists) - 1)
    contenders = [one for one in finalists if one.contends]
    fit = [
        one for one in contenders if one.gain and one.gain.value > 0 and one.gain.p_value < level
    ]
    if not fit:
        few = all(one.gain is None or one.gain.smallest_p >= level for one in finalists)
        return "none", (
            f"no candidate was shown to find more keys than the model as it came ({none.found} of "
            f"{none.asked}; the best, {best.label}, {best.found}): "
            + ("so few prompts cannot show it, ask more." if few else "train it, or ask more.")
        )
    taken = min(fit, key=lambda one: (not one.plain, one.in_pieces, one.costs, -one.found))
    said = f"it finds {taken.found} of {taken.asked} keys beyond the old window"
    if taken is best:
        said += ", and no other finds more"
        told = [one.label for one in contenders if one is not best]
        if told:
            said += f" (not told apart from it: {', '.join(told)})"
    else:
        said += f", which is not told apart from the most ({best.label}, {best.found})"
    if taken.plain:
        said += ", and plain transformers loads it"
    elif not taken.in_pieces:
        said += "; longctx.load has to serve it, plain transformers cannot"
    cost = taken.perplexity
    if cost is None:
        said += "; the model itself stays as it is"
    elif taken.costs:
        said += (
            f"; it costs {100 * math.expm1(cost.value):.1f}% of perplexity inside the old window"
        )
    else:
        said += "; no cost in perplexity was shown inside the old window"
    return taken.label, said + "."
