"""One call for all decodings: `longctx.generate`.

    said = longctx.generate(model, tokenizer, ["Once", "Twice"], decoding="dry", guard="mend")
    said.texts, said.finish_reasons, said.events

The checkpoint's generation settings change nothing here, except that the tokens it names as ends
end a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from ..errors import ModelError, RunError
from ..model import evaluating, learned_positions, unwrapped
from ..patch import methods_of
from ..scoring.batching import is_out_of_memory
from ..scoring.greedy import neutral
from .checks import check_flag, check_whole
from .decoding import Call, Decoding
from .detokenize import TextStream, text_of
from .draws import Draws, Finite, seed_of
from .loop_guard import BanProcessor, LoopGuard, parse_guard
from .registry import parse_decoding
from .requests import Prompts, new_tokens_of, prompt_ids, reach, refuse_beyond_window
from .result import Generated
from .rows import Row, Watch

__all__ = ["Generated", "ends_of", "generate", "write_rows"]


def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    decoding: str | Decoding = "greedy",
    guard: str | LoopGuard | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    stream: Callable[[int, str], object] | None = None,
    ignore_eos: bool = False,
    first_row: int = 0,
    beyond_window: bool = False,
) -> Generated:
    """Write on after prompts.

    A row depends on its prompt, the settings, the seed and its index, not on the rows beside it:
    up to the rounding of a batched forward, which can turn a tie.

    Args:
        model: in place; PEFT and other wrappers are looked through. A patch on it stays.
        tokenizer: the model's.
        prompts: one or several of: a text; a chat, which the tokenizer's template renders; token
            ids.
        decoding: a decoding, a preset, or either as text ("dry:multiplier=0.8"); see
            `longctx decodings`.
        guard: against loops; as text "ban" or "mend:copies=3".
        max_new_tokens: per row, at most; None: 256, or what the window leaves beside the longest
            prompt.
        batch_size: rows read at a time, padded on the left.
        seed: of whatever is drawn.
        stream: called with a prompt's index and its new text, as soon as nothing that comes can
            change it. The pieces of a row join up to its text.
        ignore_eos: go on after a token that ends the text.
        first_row: index of the first prompt, for what it draws: a call for prompts 8 to 15 of a
            list, with first_row=8, says what a call for all says.
        beyond_window: go on where the prompt and the new tokens are more than the model's window,
            to see what becomes of it there. A table of learned positions is never left.

    Raises:
        DataError: prompts that are empty, of another type, or too long for the model's window
            together with the new tokens.
        RunError: settings that contradict each other or cannot be used, or no memory is left.
        ModelError: a model that the decoding does not work with.
    """
    inner = unwrapped(model)
    if inner.config.is_encoder_decoder:
        raise ModelError(
            f"model type {inner.config.model_type!r} reads prompts with an encoder: expected a "
            "decoder-only model. transformers' own generate serves it."
        )
    if not inner.can_generate():
        raise ModelError(
            f"{type(inner).__name__} has no head that says tokens: load it with longctx.load, or "
            "as AutoModelForCausalLM."
        )
    chosen, watched = _checked(
        decoding, guard, max_new_tokens, batch_size, seed, stream, ignore_eos, first_row
    )
    table: Any = inner.get_input_embeddings()
    ids = prompt_ids(tokenizer, prompts, int(table.weight.shape[0]))
    limit = new_tokens_of(inner, ids, max_new_tokens)
    if not beyond_window or learned_positions(inner) is not None:
        refuse_beyond_window(inner, ids, limit)
    chosen.refuse(inner, tokenizer)
    own_ends = ends_of(inner, tokenizer)
    rows = [
        Row(
            index,
            prompt,
            limit,
            frozenset() if ignore_eos else own_ends,
            watched if watched is not None and watched.mode == "mend" else None,
            seed_of(seed, first_row + index),
            stream=None if stream is None else TextStream(tokenizer, partial(stream, index)),
        )
        for index, prompt in enumerate(ids)
    ]
    for first in range(0, len(rows), batch_size):
        try:
            write_rows(inner, tokenizer, rows[first : first + batch_size], chosen, watched)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"memory ran out with batch_size={batch_size}: pass a smaller one, or shorter "
                "prompts."
            ) from error
    return Generated(
        texts=tuple(text_of(tokenizer, row.tokens) for row in rows),
        token_ids=tuple(tuple(row.tokens) for row in rows),
        finish_reasons=tuple(row.finish or "length" for row in rows),
        events=tuple(event for row in rows for event in row.events),
    )


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text: the checkpoint's generation settings may name several.

    Some checkpoints write −1 for none.
    """
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    several: list[int | None] = [*named] if isinstance(named, list | tuple) else [named]
    own: Any = tokenizer.eos_token_id
    return frozenset(token for token in (*several, own) if token is not None and token >= 0)


def _checked(
    decoding: Any,
    guard: Any,
    max_new_tokens: int | None,
    batch_size: int,
    seed: int,
    stream: object,
    ignore_eos: bool,
    first_row: int,
) -> tuple[Decoding, LoopGuard | None]:
    """The decoding and the guard, once all settings are known to fit."""
    if max_new_tokens is not None:
        check_whole("generate", "max_new_tokens", max_new_tokens, least=1)
    check_whole("generate", "batch_size", batch_size, least=1)
    check_whole("generate", "seed", seed, least=0, most=(1 << 64) - 1)
    check_whole("generate", "first_row", first_row, least=0)
    check_flag("generate", "ignore_eos", ignore_eos)
    if stream is not None and not callable(stream):
        raise RunError(f"stream={stream!r}: expected a function of (row, new_text).")
    chosen = parse_decoding(decoding) if isinstance(decoding, str) else decoding
    if isinstance(chosen, type) or not isinstance(chosen, Decoding):
        raise RunError(
            f"decoding={decoding!r}: expected a decoding such as Dry(), or its name "
            "(`longctx decodings`)."
        )
    watched = parse_guard(guard) if isinstance(guard, str) else guard
    if watched is not None and not isinstance(watched, LoopGuard):
        raise RunError(f"guard={guard!r}: expected a LoopGuard, 'ban', 'mend' or None.")
    if watched is not None and watched.mode == "mend" and chosen.beams:
        raise RunError(
            f"guard 'mend' with {chosen.name}: a loop is known only when the beams are, and there "
            "is no temperature to raise: use the guard 'ban', or another decoding."
        )
    return chosen, watched


def write_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    decoding: Decoding,
    guard: LoopGuard | None = None,
) -> None:
    """Generate until every row of a batch has ended, which `generate` does with checked settings.

    The checkpoint's own generation settings are put aside meanwhile.
    """
    with torch.no_grad(), evaluating(model), neutral(model):
        while pending := [row for row in rows if row.finish is None]:
            for group in _groups(model, pending):
                _run(model, tokenizer, group, decoding, guard)
                for row in group:
                    if row.looped:
                        row.mend(tokenizer)


def _groups(model: PreTrainedModel, rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that may share a call.

    All rows of a call go on until the last of them ends, so none may leave the model's window by
    then. Where logits depend on how long a request may become, as many tokens are to come in each.
    """
    alike = all(method.length_invariant for method in methods_of(model))
    most, _ = reach(model)
    if most is not None and any(len(row.prompt) + row.limit > most for row in rows):
        most = None  # as was asked for
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.tokens)):
        first = groups[-1][0] if groups else row  # the one with most tokens to come
        left = first.limit - len(first.tokens)
        fits = most is None or len(row.prompt) + len(row.tokens) + left <= most
        if groups and fits and (alike or len(row.tokens) == len(first.tokens)):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    decoding: Decoding,
    guard: LoopGuard | None,
) -> None:
    """One call of the model's `generate`, for what rows have so far."""
    read = [[*row.prompt, *row.tokens] for row in rows]
    width = max(map(len, read))
    firsts = torch.tensor([width - len(each) for each in read])
    starts = torch.tensor([width - len(row.tokens) for row in rows])
    call = Call(model, tokenizer, firsts, starts, tuple(row.seed for row in rows))
    ids = torch.tensor([[0] * (width - len(each)) + each for each in read])
    mask = (torch.arange(width) >= firsts[:, None]).long()
    ends = rows[0].ends
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(row.limit - len(row.tokens) for row in rows),
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,  # after a row's end, where nobody looks; ends may lie beyond the embeddings
        **{"num_beams": 1, **decoding.settings()},
    )
    banned = [BanProcessor(guard, call)] if guard is not None and guard.mode == "ban" else []
    drawn = Draws(rows, decoding.sampling, 0.0 if guard is None else guard.min_p)
    processors: list[LogitsProcessor] = [Finite(), *decoding.processors(call), *banned]
    if not decoding.beams:
        processors.append(drawn)
    with decoding.around(call):
        out: Any = model.generate(  # pyright: ignore[reportCallIssue]
            ids.to(model.device),  # pyright: ignore[reportArgumentType]
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([] if decoding.beams else [Watch(rows)]),
            custom_generate=decoding.loop(call),
        )
    if decoding.beams:
        for row, tokens in zip(rows, out[:, width:].tolist(), strict=True):
            row.take(tokens)
