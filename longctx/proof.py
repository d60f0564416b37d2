"""Proof of effect: a patched model is run, and its logits say whether the patch did what it says.

A method may be in place in every module and yet change nothing (a family that reads its rotary
somewhere else), or fail in the first forward. So a few tokens are read before and after it, half of
them inside the old window and half beyond it, which positions reach without a long input; then once
more in two pieces with a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention.layers import attention_layers
from .attention.probing import probe_turning
from .attention.turning import Rotation
from .before_transformers_5_24 import cache_argument
from .errors import LongctxError, ModelError
from .model import evaluating, text_config
from .patch import Check, Patch, reserved

__all__ = ["Passes", "apart", "can_run", "prove", "run_passes"]

_NEAR = _FAR = 16
_CACHED = 24
"""Tokens that are read before the others continue from the cache."""
_TOLERANCE, _SHORT_TOLERANCE = 1e-3, 0.1
"""Largest rms difference over the rms of the logits, cached against whole; the second for weights
of 16 bits."""
_NOISE = 1e-6
"""What kernels that add in another order each time may change."""


@dataclass(frozen=True, slots=True)
class Passes:
    """Logits [1, seq, vocabulary] of one model state, float32 on the CPU."""

    consecutive: Tensor
    """At positions from 0 on."""
    far: Tensor | None
    """Half of the tokens beyond the old window; None where positions are not to be jumped over."""
    cached: float | None
    """How much the last tokens differ after a cache of those before, rms over the rms of the
    logits; None where the model takes no cache."""


def can_run(model: PreTrainedModel) -> bool:
    """Whether the model has its weights: one on the meta device is only looked at."""
    return not any(parameter.is_meta for parameter in model.parameters())


def run_passes(model: PreTrainedModel, patch: Patch, *, with_cache: bool = True) -> Passes:
    """Read the tokens of the proof on the model as it is, with or without the patch.

    Args:
        model: in any mode, which it keeps.
        patch: the one that is proven, in place or not yet.
        with_cache: read in two pieces too; a model that cannot without the patch is let off.

    Raises:
        ModelError: a forward fails, which the message names.
    """
    try:
        return _passes(model, patch, with_cache)
    except LongctxError:
        raise
    except Exception as error:
        state = f"{patch.method.name} in place" if patch.active else "no method on it"
        raise ModelError(
            f"model type {model.config.model_type!r} cannot read {_NEAR + _FAR} tokens with "
            f"{state}: a forward fails ({type(error).__name__}: {error})."
        ) from error


def _passes(model: PreTrainedModel, patch: Patch, with_cache: bool) -> Passes:
    consecutive = torch.arange(_NEAR + _FAR)
    far = consecutive.clone()
    far[_NEAR:] += 2 * patch.window_below
    with evaluating(model), torch.no_grad():
        rows = [consecutive, far] if _may_jump(patch) else [consecutive]
        logits = _logits(model, torch.stack(rows))
        whole = logits[:1]
        cached = _cached(model, patch) if with_cache else None
        return Passes(
            whole,
            logits[1:] if len(rows) > 1 else None,
            None if cached is None else _difference(cached, whole[:, _CACHED:]),
        )


def _may_jump(patch: Patch) -> bool:
    """Whether far positions show the method, and no rule below it counts consecutive tokens."""
    below = patch.below
    while below is not None:
        lower = below.method
        if "attention" in lower.slots and not (lower.changes_far_logits or lower.trains_only):
            return False
        below = below.below
    return patch.method.changes_far_logits


def prove(
    model: PreTrainedModel, patch: Patch, before: Passes, *, rotary_changed: bool
) -> list[Check]:
    """Read the same tokens under the patch and compare.

    Args:
        model: with the patch in place.
        patch: of it.
        before: what the model gave without it.
        rotary_changed: whether its rotary turns otherwise than before.

    Raises:
        ModelError: a forward fails under the patch.
    """
    after = run_passes(model, patch, with_cache=before.cached is not None)
    checks: list[Check] = []
    if after.far is not None and before.far is not None:
        moved = _difference(after.far, before.far)
        wanted = rotary_changed or "rotary" not in patch.method.slots
        detail = f"by {moved:.2g} of their size beyond position {2 * patch.window_below:,}"
        if moved <= _NOISE:
            detail = (
                "the layers do not read the rotary that was replaced"
                if wanted
                else "not: the rotary is as it was"
            )
        checks.append(Check("logits change", moved > _NOISE or not wanted, detail))
    if before.consecutive.isfinite().all():
        finite = bool(after.consecutive.isfinite().all())
        checks.append(Check("logits finite", finite, f"{after.consecutive.numel():,} of them"))
    if after.cached is not None and before.cached is not None:
        precise = next(model.parameters()).dtype.itemsize >= 4
        limit = _TOLERANCE if precise else _SHORT_TOLERANCE
        own, detail = before.cached, f"to {after.cached:.1e} of the logits' size"
        if own > limit:
            detail += f"; the model itself to {own:.1e}"
        checks.append(Check("cached as uncached", after.cached <= max(limit, 2 * own), detail))
    return [*checks, *_reach(model, patch)]


def apart(one: PreTrainedModel, other: PreTrainedModel, patch: Patch) -> str | None:
    """How the logits of two models under the same methods differ, None where they do not.

    Args:
        one: any model.
        other: of the same weights; its attention may be computed by another kernel.
        patch: the topmost on either.
    """
    precise = next(one.parameters()).dtype.itemsize >= 4
    for what in ("consecutive", "far"):
        a, b = (getattr(run_passes(m, patch, with_cache=False), what) for m in (one, other))
        if a is not None and b is not None:
            difference = _difference(a, b)
            if not difference <= (_TOLERANCE if precise else _SHORT_TOLERANCE):  # NaN too
                return f"logits at {what} positions differ by {difference:.1e} of their size"
    return None


def _reach(model: PreTrainedModel, patch: Patch) -> list[Check]:
    """Say where a longer window cannot help: layers that slide, those with a rotary among them."""
    if "rotary" not in patch.method.slots:
        return []
    try:
        layers = attention_layers(model)
        full, sliding = [x for x in layers if x.full], [x for x in layers if not x.full]
        if not sliding:
            return []
        if full:
            with patch.method.reserve(model, _NEAR):
                rotation = Rotation(model, patch.rope.layer_type, full[0].module)
                if probe_turning(model, full, rotation).turning:
                    return []
    except ModelError:  # attention that cannot be looked into
        return []
    which = "all layers" if not full else "all layers that have a rotary"
    detail = f"{which} slide over {sliding[0].window} tokens: other positions bring no key nearer"
    return [Check("reach", True, detail)]


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _ids(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    high = text_config(model).vocab_size
    embedding: Any = model.get_input_embeddings()
    return torch.randint(high, (1, _NEAR + _FAR), generator=generator).to(embedding.weight.device)


def _logits(model: PreTrainedModel, positions: Tensor) -> Tensor:
    """Logits [rows, seq, vocabulary] of the same tokens at the positions [rows, seq]."""
    ids = _ids(model).expand(len(positions), -1)
    # The mask says that the tokens are one text, although their positions make a step.
    output: Any = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions.to(ids.device),
        use_cache=False,
    )
    return output.logits.float().cpu()


def _cached(model: PreTrainedModel, patch: Patch) -> Tensor | None:
    """Logits of the last tokens, read after a cache of those before; None without such a cache."""
    try:
        return _continued(model, patch)
    except Exception:  # some families cannot read in pieces, whatever is on them
        if patch.active:
            raise
        return None


def _continued(model: PreTrainedModel, patch: Patch) -> Tensor | None:
    argument = cache_argument(model.base_model.forward)
    if argument is None:
        return None
    ids = _ids(model)
    with reserved(model, ids.shape[1]):
        first: Any = model(input_ids=ids[:, :_CACHED], use_cache=True)
        last: Any = model(
            input_ids=ids[:, _CACHED:],
            attention_mask=torch.ones_like(ids),
            use_cache=True,
            **{argument: first[argument]},
        )
    return last.logits.float().cpu()
