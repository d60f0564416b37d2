"""From hidden states to the cross-entropy of their next tokens, without [S, vocab] logits.

    head = head_of(model)                                   # scale, soft cap; verified on the model
    linear = projection(model)                              # its weight and bias
    nats = cross_entropy(hidden, linear.weight, targets, head=head)      # summed, float32

torch's `linear_cross_entropy` projects a chunk of rows at a time and keeps none of their logits. In
float32 it adds the rows up itself and makes the gradients in the same pass. In half precision its
sum is off by 0.4 nats on the CPU: there it is asked for the rows, which costs a second projection
in backward, and they are added up in float32. On CUDA Liger's kernel serves where it is installed.
torch's knows no soft cap; that goes through a plain loop over chunks, projected again in backward.

Legend: N rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from longctx.errors import ModelError, RunError
from longctx.model import text_config, unwrapped

from . import before_torch_2_13

__all__ = ["CrossEntropyKernel", "Head", "cross_entropy", "head_of", "projection"]

CrossEntropyKernel = Literal["auto", "torch", "liger"]

CHUNK = 1024
"""Rows projected at a time."""
_HALF = (torch.float16, torch.bfloat16)
_PROBE = 8  # tokens on which a head is verified


@dataclass(frozen=True, slots=True)
class Head:
    """What a model does to its logits: softcap · tanh(scale · (W h + b) / softcap)."""

    scale: float = 1.0
    """Factor on the logits (Cohere, Granite)."""
    softcap: float | None = None
    """Bound on their size (Gemma-2); None turns it off."""

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Logits of hidden states [N, D], float32 or float64 [N, V]."""
        out = functional.linear(hidden, weight, bias)
        out = out.to(torch.promote_types(out.dtype, torch.float32)) * self.scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)


def projection(model: PreTrainedModel) -> nn.Linear:
    """The linear layer over the hidden states, also inside a PEFT model that trains it whole.

    Raises:
        ModelError: no head, or one with adapters on it, which a weight alone does not stand for.
    """
    head: Any = model.get_output_embeddings()
    whole = getattr(head, "modules_to_save", None)
    if whole:
        head = whole[head.active_adapters[0]]
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"the head of {type(model).__name__} is {type(head).__name__}: expected a linear layer "
            "or one trained whole (modules_to_save=['lm_head']); leave adapters off it."
        )
    return head


def head_of(model: PreTrainedModel) -> Head:
    """How `model` makes its logits, read from its config and verified on a few tokens.

    Raises:
        ModelError: its logits are not reproduced from its last hidden states.
    """
    config: Any = text_config(model)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    head = Head(scale, getattr(config, "final_logit_softcapping", None))
    linear = projection(model)
    causal: Any = unwrapped(model)
    ids = torch.arange(_PROBE, device=linear.weight.device)[None] % int(config.vocab_size)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            wanted = causal(input_ids=ids, use_cache=False).logits[0].float()
            hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            found = head.logits(hidden.to(linear.weight.dtype), linear.weight, linear.bias)
    finally:
        model.train(training)
    tolerance = (1e-4 if model.dtype == torch.float32 else 2e-2) * float(wanted.abs().max())
    if found.shape != wanted.shape or not bool(((found - wanted).abs() <= tolerance).all()):
        raise ModelError(
            f"the logits of {type(causal).__name__} (model type {config.model_type!r}) are not "
            f"those of its last hidden states under {head}: this model does something to them that "
            "the chunked loss does not know. Train it with the model's own loss."
        )
    return head


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    head: Head | None = None,
    chunk: int = CHUNK,
    kernel: CrossEntropyKernel = "auto",
) -> Tensor:
    """Sum of −log p(target) over rows, in nats.

    Args:
        hidden: [N, D].
        weight: [V, D].
        targets: int64 [N], none of them ignored.
        bias: [V].
        head: scale and soft cap; None for neither.
        chunk: rows at a time.
        kernel: "liger" (CUDA), "torch", or "auto", Liger's where it is installed and serves.

    Returns:
        A scalar, float32 (float64 where the weight is).

    Raises:
        RunError: a kernel that is not there, or a sharded weight.
    """
    head = head or Head()
    hidden, weight, bias = prepared(hidden, weight, bias)
    if not len(targets):
        return anchor(hidden, weight)
    liger = _liger(kernel, hidden)
    if liger is None and head.softcap is not None:
        return sum_chunks(
            lambda rows, goals: _nats(head.logits(rows, weight, bias), goals),
            chunk,
            hidden,
            targets,
        )
    if head.scale != 1.0:
        hidden = hidden * head.scale
        bias = None if bias is None else bias * head.scale
    if liger is not None:
        # The sum is Liger's own in float32; its gradients of single rows cost a second pass.
        settings: dict[str, Any] = {"softcap": head.softcap, "accum_dtype": torch.float32}
        return liger(hidden, weight, targets, bias=bias, reduction="sum", **settings).float()
    if not hasattr(functional, "linear_cross_entropy"):
        return before_torch_2_13.linear_cross_entropy(
            hidden, weight, targets, bias=bias, chunk=chunk
        )
    losses = functional.linear_cross_entropy(
        hidden,
        weight,
        targets,
        linear_bias=bias,
        reduction="none" if hidden.dtype in _HALF else "sum",
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=chunk),
    )
    return losses.to(torch.promote_types(losses.dtype, torch.float32)).sum()


def prepared(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states and head in one dtype: autocast's where it is on, else the weight's."""
    if type(weight).__name__ == "DTensor":
        raise RunError(
            "the head's weight is sharded (FSDP): compute the loss inside the model's forward, "
            "where it is whole, or call model.unshard() before."
        )
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def anchor(hidden: Tensor, weight: Tensor) -> Tensor:
    """A loss of 0 whose gradients are 0 and not absent, as other processes' backward expects."""
    nothing = hidden.flatten()[:0].sum() + weight.flatten()[:0].sum()
    return nothing.to(torch.promote_types(nothing.dtype, torch.float32))


def sum_chunks(function: Callable[..., Tensor], chunk: int, *rows: Tensor) -> Tensor:
    """Sum of function(chunk of rows), each computed again in backward instead of kept."""
    parts: list[Tensor] = []
    for piece in zip(*(x.split(chunk) for x in rows), strict=True):
        if torch.is_grad_enabled():
            settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            parts.append(checkpoint(function, *piece, **settings))
        else:
            parts.append(function(*piece))
    return torch.stack(parts).sum(0)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, reduction="sum")


def _liger(kernel: CrossEntropyKernel, hidden: Tensor) -> Callable[..., Tensor] | None:
    """Liger's fused loss if it is asked for or at hand, None for torch's."""
    if kernel not in get_args(CrossEntropyKernel):
        raise RunError(f"kernel={kernel!r}: pass one of {', '.join(get_args(CrossEntropyKernel))}.")
    if kernel == "torch" or (kernel == "auto" and not hidden.is_cuda):
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        if kernel == "auto":
            return None
        raise RunError("kernel='liger' is not installed: `pip install liger-kernel`, or 'torch'.")
    if not hidden.is_cuda:
        raise RunError(
            f"kernel='liger' runs on CUDA, and the model is on {hidden.device}: 'torch'."
        )
    return importlib.import_module(
        "liger_kernel.transformers.functional"
    ).liger_fused_linear_cross_entropy
