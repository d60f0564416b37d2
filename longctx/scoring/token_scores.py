"""How likely a model finds the tokens it is shown, without ever holding [S, vocab] logits.

    scores = score(model, input_ids, start=4000)     # [B, S] ids, targets from position 4000 on
    scores.nll, scores.correct                       # [B, S − 4000] each

The base model runs once. Its hidden states then pass in chunks through the model's **own**
`forward` in which the base model answers with the chunk: soft-capping (Gemma-2), scaling (Cohere,
Granite) and whatever else a family does to its logits therefore need no list here. The projection
is float32 whatever the weights are, since bfloat16 logits near 20 are 0.125 apart.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..before_transformers_5_24 import cache_argument
from ..errors import DataError, ModelError
from ..model import evaluating, learned_positions, text_config, unwrapped

__all__ = ["LikeliestTokens", "TokenScores", "next_logits", "prefill", "score", "score_logits"]

_CHUNK_BYTES = 24 << 20  # of float32 logits: 128 rows of a vocabulary of 49k
_BLOCK_BYTES = 16 << 20  # of weights turned to float32 at a time
_PROBE = 8  # tokens on which a model's head path is verified

# The body of each model whose head path was compared with its own logits. That is a matter of
# code, not of weights, so once is enough.
_bodies: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class LikeliestTokens:
    """The k likeliest tokens in place of each that is scored: tensors [B, S − start, k]."""

    ids: Tensor
    """int64, the likeliest first."""
    nll: Tensor
    """float32: −log p, in nats."""
    rank: Tensor
    """int64 [B, S − start]: tokens at least as likely as the target, itself included."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of the tokens at positions start … S − 1: tensors [B, S − start] on the CPU."""

    targets: Tensor
    """int64: the tokens that were predicted."""
    nll: Tensor
    """float32: −log p(target | everything before), in nats; NaN where the logits hold a NaN."""
    argmax: Tensor
    """int64: what greedy decoding would choose; −1 where the logits hold a NaN."""
    valid: Tensor
    """bool: False where the target or the token before it is padding. Such scores mean nothing."""
    likeliest: LikeliestTokens | None = None
    """What could stand in their places; None where that was not asked for."""

    @property
    def correct(self) -> Tensor:
        """bool: whether greedy decoding, given all before, chooses the target."""
        return (self.argmax == self.targets) & self.valid


def score(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    start: int = 1,
    chunk: int | None = None,
    likeliest: int = 0,
) -> TokenScores:
    """Score each token of `input_ids` from position `start` on, given all tokens before it.

    Args:
        model: a causal language model of transformers, patched or not, also inside PEFT,
            `torch.compile` and data-parallel wrappers, which are looked through.
        input_ids: [B, S].
        attention_mask: [B, S], 0 at padding (left or right); None where there is none.
        past_key_values: keys and values of tokens before `input_ids`, which grow by S; without
            padding.
        start: first position that is scored, at least 1: nothing predicts position 0.
        chunk: rows (tokens) projected at a time; None keeps their logits within 24 MiB, at least
            64 rows.
        likeliest: find so many of the likeliest tokens in each place too.

    Raises:
        DataError: shapes or `start` that do not fit.
        ModelError: more tokens than a learned position table holds, or a model whose logits are
            not a function of its base model's last hidden states.
    """
    causal = _causal(model)
    ids = input_ids.to(causal.get_input_embeddings().weight.device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    mask = None if attention_mask is None else attention_mask.to(ids.device)
    _check(causal, ids, mask, past_key_values, start, chunk)
    rows = chunk or max(64, _CHUNK_BYTES // (4 * int(text_config(causal).vocab_size)))
    with torch.no_grad(), evaluating(causal):
        body = _body(causal, ids[:1, :_PROBE])
        output = _run_body(body, ids, mask, past_key_values)
        targets = ids[:, start:]
        flat_nd = rearrange(output[0][:, start - 1 : -1], "b t d -> (b t) d")
        with _head(causal, body, output) as project:
            parts: list[tuple[Tensor, ...]] = []
            for part, wanted in zip(
                flat_nd.split(rows), targets.flatten().split(rows), strict=True
            ):
                logits = project(part).float()
                wanted = wanted.to(logits.device)
                found: tuple[Tensor, ...] = score_logits(logits, wanted, causal.dtype)
                if likeliest:
                    found += _likeliest(logits, wanted, likeliest)
                parts.append(found)
    columns = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
    nll, argmax = (column.view(targets.shape) for column in columns[:2])
    top = None
    if likeliest:
        ids_nk, nll_nk, rank_n = columns[2:]
        shape = (*targets.shape, -1)
        top = LikeliestTokens(ids_nk.view(shape), nll_nk.view(shape), rank_n.view(targets.shape))
    valid = torch.ones_like(targets, dtype=torch.bool)
    if mask is not None:
        valid = (mask[:, start:] != 0) & (mask[:, start - 1 : -1] != 0)
    return TokenScores(targets.cpu(), nll, argmax, valid.cpu(), top)


def prefill(
    model: nn.Module,
    input_ids: Tensor,
    past_key_values: Cache,
    *,
    arguments: Mapping[str, Any] | None = None,
    inside: AbstractContextManager[Any] | None = None,
) -> None:
    """Run `input_ids` [B, S] after what the cache holds and leave their keys and values there.

    Args:
        model: as `score` takes it.
        input_ids: without padding.
        past_key_values: grows by S.
        arguments: further ones of the decoder.
        inside: what that one forward pass runs inside.
    """
    causal = _causal(model)
    ids = input_ids.to(causal.get_input_embeddings().weight.device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with torch.no_grad(), evaluating(causal):
        body = _body(causal, ids[:1, :_PROBE])
        with inside or nullcontext():
            _run_body(body, ids, None, past_key_values, arguments)


def next_logits(
    model: nn.Module, input_ids: Tensor, past_key_values: Cache, *, first: int
) -> Tensor:
    """Run `input_ids` [1, S] after what the cache holds; the logits after them, float32 [vocab].

    `first` is the position of the first of them, whatever the cache has kept of those before.
    """
    causal = _causal(model)
    ids = input_ids.to(causal.get_input_embeddings().weight.device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with torch.no_grad(), evaluating(causal):
        body = _body(causal, ids[:1, :_PROBE])
        given: dict[str, Any] = {}
        if "position_ids" in inspect.signature(body.forward).parameters:
            last = first + ids.shape[1]
            given["position_ids"] = torch.arange(first, last, device=ids.device)[None]
        output = _run_body(body, ids, None, past_key_values, given)
        with _head(causal, body, output) as project:
            return project(output[0][0, -1:])[0].float()


def score_logits(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return NLL (float32) and argmax of logits [N, vocab] (float32) for targets [N].

    The argmax is that of the model's `dtype`; −1 where the logits hold a NaN.
    """
    nll = nn.functional.cross_entropy(logits, targets, reduction="none")
    # `generate` compares logits of the model's dtype, in which near ties are ties.
    argmax = logits.to(dtype).argmax(-1)
    return nll, argmax.masked_fill(logits.sum(-1).isnan(), -1)


def _likeliest(logits: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and NLL [N, k] of the likeliest tokens, and each target's rank [N]."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    rank = (logits >= logits.gather(-1, targets[:, None])).sum(-1)
    return ids, logits.logsumexp(-1, keepdim=True) - values, rank


def _causal(model: nn.Module) -> PreTrainedModel:
    causal = unwrapped(model)  # a PEFT model holds its adapters inside the inner one
    if causal.get_output_embeddings() is None or not _bodies_of(causal):
        raise ModelError(
            f"{type(causal).__name__} has no head over a base model: expected a causal language "
            "model; load it with AutoModelForCausalLM or longctx.load."
        )
    return causal


def _bodies_of(model: PreTrainedModel) -> list[nn.Module]:
    """What may be the base of a head: Llama-4's text model is neither base model nor decoder."""
    found: Any = (model.base_model, model.get_decoder(), getattr(model, "model", None))
    return [body for body in found if isinstance(body, nn.Module) and body is not model]


def _check(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor | None,
    cache: Cache | None,
    start: int,
    chunk: int | None,
) -> None:
    if ids.ndim != 2:
        raise DataError(f"input_ids has shape {tuple(ids.shape)}: expected [batch, tokens].")
    if mask is not None and mask.shape != ids.shape:
        raise DataError(
            f"attention_mask has shape {tuple(mask.shape)} beside input_ids of {tuple(ids.shape)}: "
            "expected the same."
        )
    if not 1 <= start < ids.shape[1]:
        raise DataError(
            f"start={start} with {ids.shape[1]} tokens: expected 1 to {ids.shape[1] - 1}, since "
            "nothing predicts position 0."
        )
    if chunk is not None and chunk < 1:
        raise DataError(f"chunk={chunk}: expected at least one row.")
    if mask is not None and cache is not None:
        raise DataError("attention_mask beside past_key_values: cached tokens have no padding.")
    limit = learned_positions(model)
    length = ids.shape[1] + (0 if cache is None else cache.get_seq_length())
    if limit is not None and length > limit:
        raise ModelError(
            f"{length} tokens are more than the {limit} learned positions of model type "
            f"{model.config.model_type!r}: score at most {limit}."
        )


def _run_body(
    body: nn.Module,
    ids: Tensor,
    mask: Tensor | None,
    cache: Cache | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """Run the model below the head; the output's first entry is its last states [B, S, D]."""
    extra: dict[str, Any] = dict(arguments or {})
    if cache is not None:
        extra[cache_argument(body.forward) or "past_key_values"] = cache
    if mask is not None:
        extra["attention_mask"] = mask
        if "position_ids" in inspect.signature(body.forward).parameters:
            extra["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return body(input_ids=ids, use_cache=cache is not None, **extra)


@contextmanager
def _head(
    model: PreTrainedModel, body: nn.Module, output: Any
) -> Generator[Callable[[Tensor], Tensor]]:
    """Give the function from hidden states [N, D] to the model's own logits [N, vocab].

    Inside the block the body answers with a given piece in place of running, and a plain
    linear head of another dtype than float32 projects in float32.
    """
    head = model.get_output_embeddings()
    piece: Any = None

    def project(hidden_nd: Tensor) -> Tensor:
        nonlocal piece
        states = rearrange(hidden_nd, "n d -> 1 n d")
        if isinstance(output, tuple):
            piece = (states, *output[1:])
        else:
            piece = type(output)(**{**output, "last_hidden_state": states})
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        return rearrange(model(input_ids=ids, use_cache=False).logits, "1 n v -> n v")

    with _swapped(body, lambda *_, **__: piece):
        if (
            type(head) is nn.Linear
            and head.weight.dtype != torch.float32
            and not head.weight.is_meta
        ):
            with _swapped(head, lambda x: _project_float32(head, x)):
                yield project
        else:
            yield project


@contextmanager
def _swapped(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Replace one instance's forward; accelerate keeps its hooks in the same place."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _project_float32(head: nn.Linear, x: Tensor) -> Tensor:
    """`head(x)` with float32 results, without a float32 copy of all its weights."""
    weight, bias = head.weight, head.bias
    x = x.to(weight.device)
    if weight.is_cuda:
        flat = rearrange(x, "b n d -> (b n) d")
        out = torch.mm(flat, weight.T, out_dtype=torch.float32).view(*x.shape[:2], -1)
    else:
        out = x.new_empty((*x.shape[:2], weight.shape[0]), dtype=torch.float32)
        size = max(1, _BLOCK_BYTES // (4 * weight.shape[1]))
        wide = x.float()
        for first in range(0, weight.shape[0], size):
            out[..., first : first + size] = wide @ weight[first : first + size].float().T
    return out if bias is None else out + bias.float()  # pyright: ignore[reportUnnecessaryComparison]


def _body(model: PreTrainedModel, ids: Tensor) -> nn.Module:
    """Find the module whose hidden states the head turns into the model's own logits.

    It is the base model, or the decoder where `forward` reaches past the base model (OPT). Either
    is verified on `ids`, a few tokens [1, n].
    """
    if model in _bodies:
        return _bodies[model]
    wanted = model(input_ids=ids, use_cache=False).logits[0].float()
    scale = wanted.nan_to_num(0, 0, 0).abs().max().item()
    tolerance = scale * (1e-4 if model.dtype == torch.float32 else 2e-2)
    why = ""
    for body in _bodies_of(model):
        try:
            output = _run_body(body, ids, None)
            with _head(model, body, output) as project:
                found = project(output[0][0]).to(wanted)
            torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance, equal_nan=True)
        except (AssertionError, AttributeError, KeyError, TypeError) as error:
            why = str(error).partition("\n")[0]
            continue
        _bodies[model] = body
        return body
    raise ModelError(
        f"cannot score {type(model).__name__} (model type {model.config.model_type!r}): its logits "
        f"are not reproduced from its base model's last hidden states ({why}). Expected a causal "
        "language model of transformers whose head follows its base model."
    )
