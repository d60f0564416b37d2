"""Does a running server compute the model that was measured?

    found = check_server(model, tokenizer, client, settings, say=print)
    print(found)          # a table, the reasons, a verdict
    found.ok

Log-probabilities of the same token ids are compared token by token, by the largest and the median
difference; in the mean one wrong token is lost. Where the server differs, models that it may
compute instead are tried: the unextended one, other temperatures, the same in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DataError, LongctxError, ModelError, RunError
from ..model import (
    build_rotary,
    put_rope_parameters,
    put_rotary,
    rope_of,
    rotary_of,
    scaled_rope,
    text_config,
    with_rope_entry,
)
from ..patch import patch_of, reserved
from ..prompts.haystacks import Texts, bos_of, encode, held_out
from ..rope import ScaledRotary, frequencies_of
from ..scoring.token_scores import score
from ..weights import refuse_small_vocabulary
from .clients import RefusedError, Scorer
from .verdict import SAME, Limit, diagnosis, largest, limits_of, same, undecided

__all__ = [
    "CheckSettings",
    "Checked",
    "Row",
    "check_server",
    "lengths_of",
    "strip",
    "window_of_model",
]

_SLACK = 256
"""Tokens that a server may round its window up by."""
_TEXTS = 3
"""Texts whose tokens are compared."""
_Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What is asked of the server."""

    lengths: tuple[int, ...] = ()
    """Tokens of the prompts; none for 1 and 2 times the old window, and the window less one."""
    positions: int | None = None
    """Tokens of each prompt that are compared, spread evenly; None for all."""
    dtype: _Dtype = "float32"
    """What the server computes in. Half precision is judged against our own rounding."""
    seed: int = 0
    """Which stretch of text is taken."""


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt."""

    length: int
    """Tokens."""
    compared: int
    """Of them, how many were compared."""
    largest: float
    """|Δ log p| against our model, in nats."""
    median: float
    plain: float | None
    """Largest against the unextended model; None where nothing is extended."""
    between: float | None
    """Largest between our model and the unextended one: what there is to be lost."""
    allowed: float
    """The largest difference that counts as the same."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a server computes."""

    window: int
    """Tokens that our model promises."""
    served: int | None
    """Tokens that the server takes; None where it does not say."""
    rows: tuple[Row, ...]
    faults: tuple[str, ...]
    """What is wrong, in words; none where the server gives our numbers."""
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether the server gives our numbers."""
        return not self.faults

    def __str__(self) -> str:
        head = f"{'tokens':>8} {'compared':>9} {'largest':>9} {'median':>9} {'allowed':>9} "
        lines = [head + f"{'unextended':>11} {'(ours from it)':>15}"]
        for row in self.rows:
            plain = "–" if row.plain is None else f"{row.plain:.1e}"
            between = "–" if row.between is None else f"{row.between:.1e}"
            lines.append(
                f"{row.length:>8} {row.compared:>9} {row.largest:>9.1e} {row.median:>9.1e} "
                f"{row.allowed:>9.1e} {plain:>11} {between:>15}"
            )
        served = "not said" if self.served is None else f"{self.served:,}"
        lines.append(f"window: ours {self.window:,} tokens, the server's {served}")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"FAULT {fault}" for fault in self.faults]
        if self.ok:
            lines.append("the server computes this checkpoint")
        return "\n".join(lines)


def check_server(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    client: Scorer,
    settings: CheckSettings | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Checked:
    """Hold a server's log-probabilities against a model's.

    Args:
        model: as longctx.load gives it, in float32. **It is used up**: patches are taken off it,
            and its weights are cast, to try what the server may compute instead.
        tokenizer: its tokenizer.
        client: of the server.
        settings: which prompts.
        say: takes a line about what is being done.

    Raises:
        RunError: no server there, an answer of another form, or lengths beyond the window.
        ModelError: a tokenizer with ids beyond the model's embeddings.
    """
    settings = settings or CheckSettings()
    refuse_small_vocabulary(model, tokenizer)
    window, original = window_of_model(model)
    lengths = settings.lengths or lengths_of(window, original)
    if not all(2 <= length < window for length in lengths):
        raise RunError(
            f"lengths {[*lengths]}: expected 2 to {window - 1} tokens, one less than the window."
        )
    served = client.window()
    faults = [*_window_faults(window, served)]
    notes: list[str] = []
    token_faults = _token_faults(tokenizer, client)
    if token_faults is None:
        notes.append("the server has no /tokenize: its tokenizer was not compared with ours")
    else:
        faults += token_faults
    prompts = _prompts(tokenizer, lengths, settings.seed)
    theirs: dict[int, Tensor] = {}
    for ids in prompts:
        places = _places(len(ids), settings.positions)
        say(f"asking the server for {len(places)} of {len(ids)} tokens")
        try:
            theirs[len(ids)] = client.logprobs(ids, places)
        except RefusedError as error:
            faults.append(f"it does not take {len(ids)} tokens of {window}: {error}")
    prompts = [ids for ids in prompts if len(ids) in theirs]
    if not prompts:
        return Checked(window, served, (), tuple(faults), tuple(notes))

    chosen = [torch.tensor(_places(len(ids), settings.positions)) - 1 for ids in prompts]

    def run(what: str) -> list[Tensor]:
        """Of all tokens: few of them would not show how much is rounded."""
        say(f"computing {what}")
        return [_ours(model, ids, window) for ids in prompts]

    def compared(found: list[Tensor]) -> list[Tensor]:
        return [each[places] for each, places in zip(found, chosen, strict=True)]

    exact = run("the same by longctx")
    answers = [theirs[len(ids)] for ids in prompts]
    reference, limits = compared(exact), [Limit(SAME, SAME)] * len(prompts)
    half = settings.dtype != "float32"
    if half:
        with _cast(model, settings.dtype):
            rounded = run(f"the same in {settings.dtype}")
        reference, limits = compared(rounded), limits_of(exact, rounded)
    others: dict[str, list[Tensor]] = {}
    rounding: list[Limit] | None = None
    wrong = not same(answers, reference, limits)
    if wrong or half:
        for what, scaling in _temperatures(model).items():
            with _cast(model, settings.dtype), _temperature(model, scaling):
                others[what] = compared(run(f"the same with {what}"))
    if wrong and not half:
        with _cast(model, "bfloat16"):
            rounding = limits_of(exact, run("the same in bfloat16"))
    plain: list[Tensor] | None = None
    if strip(model):
        with _cast(model, settings.dtype):
            plain = compared(run("the unextended model"))
    if wrong:
        faults.append(diagnosis(answers, reference, limits, plain, others, rounding))
    else:
        if plain is not None and window > original:
            others["the unextended model"] = plain
        faults += undecided(answers, reference, limits, others)
    rows = [
        Row(
            len(ids), len(answer), largest(answer - mine), float((answer - mine).abs().median()),
            None if plain is None else largest(answer - plain[index]),
            None if plain is None else largest(reference[index] - plain[index]),
            limits[index].largest,
        )
        for index, (ids, answer, mine) in enumerate(zip(prompts, answers, reference, strict=True))
    ]  # fmt: skip
    return Checked(window, served, tuple(rows), tuple(faults), (*notes, *_notes(rows)))


def window_of_model(model: PreTrainedModel) -> tuple[int, int]:
    """Tokens that a model promises, and those before it was extended."""
    patch = patch_of(model)
    if patch is not None:
        return patch.window, patch.rope.length
    held = int(text_config(model).max_position_embeddings)
    try:
        return held, rope_of(model).length
    except ModelError:  # no rotary that we know: nothing is extended
        return held, held


def lengths_of(window: int, original: int) -> tuple[int, ...]:
    """1 and 2 times the old window, and the window less one, as far as they are below it."""
    return tuple(sorted({min(length, window - 1) for length in (original, 2 * original, window)}))


def _places(length: int, count: int | None) -> list[int]:
    """Positions that are compared, the last among them; nothing predicts the first token."""
    if count is None or count >= length - 1:
        return list(range(1, length))
    if count == 1:
        return [length - 1]
    return torch.linspace(1, length - 1, count).round().int().unique().tolist()


def _prompts(
    tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], seed: int
) -> list[list[int]]:
    """Stretches of text, BOS first where the tokenizer puts one."""
    texts: Texts = held_out()
    ids: list[int] = [*bos_of(tokenizer)]
    for index in range(len(texts.documents)):
        ids += encode(tokenizer, texts.documents[(index + seed) % len(texts.documents)])
        if len(ids) >= max(lengths):
            break
    if len(ids) <= len(bos_of(tokenizer)):
        raise DataError("the tokenizer makes no tokens of a text: it is not the model's.")
    while len(ids) < max(lengths):  # a window longer than the text: it is read again
        ids += ids[len(bos_of(tokenizer)) :]
    return [ids[:length] for length in lengths]


def _ours(model: PreTrainedModel, ids: list[int], window: int) -> Tensor:
    """Our log-probabilities of all tokens but the first, float64 [N − 1]."""
    with reserved(model, window):
        nll = score(model, torch.tensor([ids])).nll[0]
    return -nll.double().cpu()


def _window_faults(window: int, served: int | None) -> Iterator[str]:
    if served is not None and not window <= served < window + _SLACK:
        yield (
            f"wrong window: the server takes {served:,} tokens, the checkpoint promises {window:,} "
            f"(longctx serve-flags names the option)"
        )


def _token_faults(tokenizer: PreTrainedTokenizerBase, client: Scorer) -> tuple[str, ...] | None:
    """How the server splits texts otherwise than we do; None where it cannot be asked."""
    samples = [text[:2000] for text in held_out().documents[:_TEXTS]]
    for text in (*samples, "It's 12345.67 € — naïve\n\n\tdef f(x):  return x  # ✓ 東京"):
        found = client.tokenize(text)
        if found is None:
            return None
        wanted: list[int] = tokenizer(text, verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
        if found != wanted:
            pairs = enumerate(zip(found, wanted, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(wanted)))
            return (
                f"another tokenizer: of a text of {len(wanted)} tokens the server makes "
                f"{len(found)}; token {at} is {found[at : at + 1]}, ours {wanted[at : at + 1]}",
            )
    return ()


def strip(model: PreTrainedModel) -> bool:
    """Take off what extends the model; False where nothing does."""
    patch, stripped = patch_of(model), False
    while patch is not None:
        patch.remove()
        patch, stripped = patch_of(model), True
    if stripped:
        return True
    try:
        rope = rope_of(model)
        if scaled_rope(text_config(model)) is None:
            return False
    except ModelError:
        return False
    config = text_config(model)
    put_rope_parameters(config, with_rope_entry(config, rope.parameters("default")), setattr)
    put_rotary(model, build_rotary(model, rope.layer_type), setattr)
    return True


def _temperatures(model: PreTrainedModel) -> dict[str, float]:
    """Factors on cos and sin that a server may take for ours, by what one would then say."""
    try:
        rope = rope_of(model)
        _, scaling = frequencies_of(rotary_of(model), rope.layer_type)
    except (LongctxError, AttributeError):
        return {}
    window, original = window_of_model(model)
    scale = math.log(max(1.0, window / original))
    usual, phi = 0.1 * scale + 1, math.sqrt(1 + scale / math.log(max(2, original)))
    named = {
        "no temperature (attention factor 1)": 1.0,
        f"YaRN's usual temperature ({usual:.4g})": usual,
        f"longrope's usual temperature ({phi:.4g})": phi,
    }
    return {what: value for what, value in named.items() if abs(value - scaling) > 1e-4}


@contextmanager
def _temperature(model: PreTrainedModel, value: float) -> Generator[None]:
    """The model with another factor on cos and sin inside the block."""
    rotary: Any = rotary_of(model)
    native = rotary.native if isinstance(rotary, ScaledRotary) else rotary
    kind = rope_of(model).layer_type
    name = "attention_scaling" if kind is None else f"{kind}_attention_scaling"
    before = getattr(native, name)
    setattr(native, name, value)
    try:
        yield
    finally:
        setattr(native, name, before)


@contextmanager
def _cast(model: PreTrainedModel, dtype: _Dtype) -> Generator[None]:
    """The model with its weights in another dtype inside the block; buffers stay as they are."""
    wanted = getattr(torch, dtype)
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, data in before:
        if data.is_floating_point() and data.dtype != wanted:
            parameter.data = data.to(wanted)
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


def _notes(rows: list[Row]) -> tuple[str, ...]:
    if any(row.between is not None and row.between < 10 * row.allowed for row in rows):
        return (
            "at some lengths our model and the unextended one differ by less than ten times what "
            "is allowed: those lengths prove little",
        )
    return ()
