"""The attention name "longctx" in transformers, and what stands in for a rotary beside it.

transformers finds attention and mask functions by a process-wide name, so both functions here keep
no state: what a layer does is read from the attribute `longctx_attention` of its own attention
module. Modules without it run transformers' SDPA with the mask that it would have had.

What the mask function returns reaches the attention function untouched:

    None                 every key is real, S = N or S = 1
    bool  [B, 1, 1, n]   which of the first n keys are real; n = keys written so far, N < n where a
                         cache has dropped some
    int   [B, 1, 1, N]   number of each key's document, for packed documents (S = N)
    bool  [B, 1, S, N]   anything else (sliding windows, image blocks): transformers' own mask

Legend: B batch, S queries, N keys in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..errors import ModelError

__all__ = [
    "ATTRIBUTE",
    "NAME",
    "SCALE",
    "AttentionRule",
    "IdentityRotary",
    "QueryScale",
    "key_positions",
    "positions_in_rows",
    "register",
    "text_positions",
    "visible",
]

NAME = "longctx"
"""The value of `attn_implementation`."""
ATTRIBUTE = "longctx_attention"
"""The attribute of an attention module that holds its `AttentionRule`."""
SCALE = "longctx_query_scale"
"""The attribute of an attention module that holds its `QueryScale`."""
_ROWS = 1024
_REFUSED = {
    "softcap": "soft-capped logits (Gemma-2)",
    "s_aux": "attention sinks of its own (GPT-OSS)",
    "position_bias": "a position bias of its own",
    "cache": "a paged cache (continuous batching)",
}


class AttentionRule(Protocol):
    """What a method puts on an attention module; q [B, H, S, D], k and v [B, K, N, D]."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        positions: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """Return [B, H, S, D]; the mask is one of this file's four kinds.

        `positions` are those of the queries as the model names them, [B or 1, S], None where it
        names none; `key_positions` makes those of the keys from them.
        """
        ...


class QueryScale(Protocol):
    """A factor on queries that follows their positions; it stacks with any rule."""

    def __call__(self, positions: Tensor) -> Tensor:
        """From positions in tokens, float64 [B, S], to factors on the logits, float64 [B, S]."""
        ...


class IdentityRotary(nn.Module):
    """A rotary that turns nothing: cos 1 and sin 0, for methods that apply positions in attention.

    Args:
        native: the model's own rotary, which says the form of cos and sin and still serves the
            other layer types.
        layer_type: the layer type that is not turned, None where there is only one.
    """

    def __init__(self, native: nn.Module, layer_type: str | None) -> None:
        super().__init__()
        self.native = native
        self.layer_type = layer_type

    def __getattr__(self, name: str) -> Any:
        """`inv_freq` is zeros [dim/2] and `attention_scaling` 1; the rest is the native one's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("native", "layer_type"):  # not built yet
                raise
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        if name == f"{prefix}attention_scaling":
            return 1.0
        value: Any = getattr(self.native, name)
        return torch.zeros_like(value) if name == f"{prefix}inv_freq" else value

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return cos and sin [batch, seq, dim] in the native form, also as complex numbers."""
        turned: Any = self.native(x, position_ids, *args, **kwargs)
        if self.layer_type is not None and self.layer_type not in (*args, *kwargs.values()):
            return turned
        if isinstance(turned, Tensor):
            return torch.ones_like(turned)
        cos, sin = turned
        return torch.ones_like(cos), torch.zeros_like(sin)


def register() -> None:
    """Make the name "longctx" known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,  # transformers' contract: each model passes its own extras
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    Returns:
        ([B, S, H, D], None).

    Raises:
        ModelError: attention dropout, or something that this attention does not compute.
    """
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} asks for {meaning}, which longctx's attention does not "
                f"compute ({name}); use a method that changes frequencies only."
            )
    scale: QueryScale | None = getattr(module, SCALE, None)
    if scale is not None:
        query = _scaled(query, scale, position_ids, attention_mask)
    rule: AttentionRule | None = getattr(module, ATTRIBUTE, None)
    if rule is None:
        queries, keys = query.shape[2], key.shape[2]
        if attention_mask is not None and attention_mask.shape[-2] == 1 < queries:
            keys = attention_mask.shape[-1]
            attention_mask = _full_mask(attention_mask, queries)
        elif attention_mask is not None:
            keys = attention_mask.shape[-1]
        key, value = key[:, :, :keys], value[:, :, :keys]
        return sdpa_attention_forward(
            *(module, query, key, value, attention_mask, dropout, scaling), **kwargs
        )
    if dropout > 0:
        raise ModelError(
            f"attention dropout of {dropout:g} in {type(module).__name__}: longctx's attention has "
            "none. Set model.config.attention_dropout = 0 before loading, or call model.eval()."
        )
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ModelError(f"{type(module).__name__} is not causal: longctx extends decoders only.")
    if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
        # A static cache on its first use: transformers drops the mask, the keys beyond are empty.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    width = value.shape[-1]
    if width < key.shape[-1]:  # multi-head latent attention: what is zero adds nothing
        value = nn.functional.pad(value, (0, key.shape[-1] - width))
    out = rule(
        query,
        key,
        value,
        mask=attention_mask,
        positions=position_ids,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return out[..., :width].transpose(1, 2).contiguous(), None


def text_positions(positions: Tensor | None) -> Tensor:
    """The positions of a text, for whatever cannot do without them.

    Args:
        positions: as the model names them.

    Raises:
        ModelError: it names none, or positions in several dimensions.
    """
    if positions is None:
        raise ModelError(
            "this model hands its attention no position_ids: there is nothing to count by. Methods "
            "that change frequencies may work."
        )
    if positions.ndim != 2:
        raise ModelError(
            f"position_ids of shape {[*positions.shape]}: expected [batch, seq]; positions in "
            "several dimensions (images, video) have no distance."
        )
    return positions


def positions_in_rows(positions: Tensor, mask: Tensor | None) -> Tensor:
    """Positions counted from each row's first real token, where a mask says which that is.

    A model with RoPE reads a padded row right whatever number its first token has; what depends on
    the number itself (chunks, groups, the logarithm of a position) would not.

    Args:
        positions: of the queries, in tokens, [B or 1, S].
        mask: one of this file's four kinds; without padding in it positions stay as they are.

    Returns:
        [B or 1, S]; 0 for padding on the left.
    """
    if mask is None or mask.dtype != torch.bool or mask.shape[-3:-1] != (1, 1):
        return positions
    counted = mask[:, 0, 0].cumsum(-1) - 1
    return counted[:, -positions.shape[1] :].clamp(min=0)


def _scaled(
    query: Tensor, scale: QueryScale, positions: Tensor | None, mask: Tensor | None
) -> Tensor:
    factors = scale(positions_in_rows(text_positions(positions), mask).double())
    precise = torch.promote_types(query.dtype, torch.float32)
    return (query.to(precise) * factors[:, None, :, None].to(precise)).to(query.dtype)


def key_positions(
    position_ids: Tensor | None, query: Tensor, key: Tensor, mask: Tensor | None
) -> Tensor | None:
    """Positions of the keys where the call names them and they are not simply consecutive.

    Args:
        position_ids: of the queries, [B or 1, S].
        query: [B, H, S, D].
        key: [B, K, N, D].
        mask: as an `AttentionRule` is given it.

    Returns:
        [B or 1, N]; None where they are consecutive, or there are keys before the first query.

    Raises:
        ModelError: they have several dimensions, or go backwards without a mask that keeps
            documents apart.
    """
    queries = query.shape[2]
    keys = key.shape[2] if mask is None else mask.shape[-1]
    if position_ids is None or queries == 1 or queries != keys:
        return None
    steps = text_positions(position_ids).diff(dim=1)
    if mask is not None and mask.shape[-2] == 1:
        # Steps between documents, and those of padding, are not distances.
        kind = mask[:, 0, 0]
        skipped = kind[:, 1:] != kind[:, :-1]
        if kind.dtype == torch.bool:
            skipped = skipped | ~kind[:, 1:]
        steps = steps.masked_fill(skipped, 1)
    if bool((steps == 1).all()):
        return None
    if (mask is None or mask.shape[-2] == 1) and bool((steps < 0).any()):
        raise ModelError(
            "position_ids go backwards although every token sees those before it; for packed "
            "documents pass use_cache=False and no attention_mask, so that they are kept apart."
        )
    return position_ids


def _full_mask(mask: Tensor, queries: int) -> Tensor:
    """The [B, 1, S, n] mask that a compact one stands for."""
    if mask.is_floating_point():
        return mask
    keys = mask.shape[-1]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device)
    causal = causal.tril(keys - queries)
    return causal & (mask if mask.dtype == torch.bool else mask == mask.transpose(-1, -2))


def visible(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Which keys each query may see, written out: what any of the four kinds of mask stands for.

    Args:
        q: [B, H, S, D].
        k: [B, K, N, D].
        mask: as an `AttentionRule` is given it.

    Returns:
        bool [B, 1, S, n] over the first n ≤ N keys, causality included.

    Raises:
        ModelError: a mask of numbers to add to the logits.
    """
    queries, keys = q.shape[2], k.shape[2]
    if mask is None:
        mask = torch.ones(len(q), 1, 1, keys, dtype=torch.bool, device=q.device)
    if mask.is_floating_point():
        raise ModelError(
            f"a mask of {mask.dtype} [{', '.join(map(str, mask.shape))}], added to the logits: "
            "expected attention_mask as [batch, tokens], or a mask of bool."
        )
    return _full_mask(mask, queries) if mask.shape[-2] == 1 else mask


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,  # transformers' contract: dtype, config and what later versions add
) -> Tensor | None:
    """The mask function that transformers calls; returns one of this file's four kinds.

    Args:
        batch_size: B.
        q_length: S.
        kv_length: N, for a static cache its whole length.
        q_offset: slot of the first query.
        kv_offset: slot of the first key.
        mask_function: says for (batch, head, query, key) whether it is visible.
        attention_mask: bool [B, tokens seen], false for padding.
        local_size: window of a sliding layer.
        allow_is_causal_skip: whether None may stand for a causal mask.
        use_vmap: whether `mask_function` takes single indices only.
        device: where to make it.
        **kwargs: handed on to transformers' own mask function.
    """
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "allow_is_causal_skip": allow_is_causal_skip,
        "use_vmap": use_vmap,
        "device": device,
        **kwargs,
    }
    if local_size is not None or kv_offset or use_vmap:
        return sdpa_mask(**settings)
    if mask_function is not causal_mask_function:
        numbers = None if attention_mask is not None else _document_numbers(settings)
        return sdpa_mask(**settings) if numbers is None else numbers
    written = int(q_offset) + q_length
    if attention_mask is None:
        real = torch.ones(batch_size, written, dtype=torch.bool, device=device)
    else:
        short = max(0, written - attention_mask.shape[-1])
        real = nn.functional.pad(attention_mask[:, :written].bool(), (0, short))
    nothing_hidden = attention_mask is None or bool(real.all())
    if nothing_hidden and written == kv_length and q_length in (1, kv_length):
        return None
    return real[:, None, None]


def _document_numbers(settings: dict[str, Any]) -> Tensor | None:
    """Number of each key's document [B, 1, 1, N] if the mask is causal within documents, else None.

    The mask is looked at in strips, so that it never exists as a whole.
    """
    queries, device = settings["q_length"], settings["device"]
    if settings["q_offset"] != 0 or queries != settings["kv_length"] or queries == 1:
        return None
    function: Callable[..., Tensor] = settings["mask_function"]
    batch = torch.arange(settings["batch_size"], device=device)[:, None]
    later, head = torch.arange(1, queries, device=device)[None], torch.zeros_like(batch)
    parted = ~function(batch, head, later, later - 1)
    parted = parted.expand(settings["batch_size"], -1)
    numbers = nn.functional.pad(parted.cumsum(1), (1, 0))[:, None, None].int()
    for first in range(0, queries, _ROWS):
        rows = min(_ROWS, queries - first)
        strip = {"q_offset": first, "q_length": rows, "allow_is_causal_skip": False}
        arguments: dict[str, Any] = {**settings, **strip}
        wanted = sdpa_mask(**arguments)
        same = numbers[..., first : first + rows].transpose(-1, -2) == numbers
        own = torch.arange(first, first + rows, device=device)
        causal = own[:, None] >= torch.arange(queries, device=device)
        if wanted is None or not torch.equal(wanted, same & causal):
            return None
    return numbers
