"""A model whose own forward gives the loss of a batch, for as long as it trains.

    loss_forward = LossForward.on(model, Losses())
    loss = model(**inputs, labels=batch["labels"], document_ids=batch["document_ids"], count=count)
    loss = model(prefixes=prefixes)           # sequence-level unlikelihood of their continuations
    loss_forward.remove()

The loss is made inside `forward`, where wrappers (DDP, FSDP, autocast) expect it and where the
head's sharded weight is whole. A call with neither `count` nor `prefixes` runs the model's own
forward, so evaluation and generation between steps are what they were. The instance is changed,
never its class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from longctx.errors import ModelError
from longctx.model import text_config, unwrapped

from ..data.collate import PADDING
from ..data.tokenize import IGNORED
from ..loss.cross_entropy import Head, head_of, projection
from ..loss.distillation import Teacher
from ..loss.long_ce import LongCE, ShortContext
from ..loss.objective import Losses

__all__ = ["LossForward"]


@dataclass(slots=True)
class LossForward:
    """The loss in place on one model."""

    model: PreTrainedModel
    native: Callable[..., Any]
    """The model's own forward."""

    @classmethod
    def on(
        cls,
        model: Any,
        losses: Losses,
        shares: tuple[float, ...] = (1.0,),
        teacher: PreTrainedModel | None = None,
    ) -> LossForward:
        """Install the loss forward.

        Args:
            model: patched or not, or a PEFT model around one.
            losses: what is minimised.
            shares: of the loss, for each kind of document (`kind_ids`); each kind's tokens are
                averaged apart. A kind without any token in an update gives its share to the others.
            teacher: the model that is learnt from, frozen, called with the same inputs.

        Raises:
            ModelError: a head that the chunked loss does not know.
        """
        causal = unwrapped(model)
        head, native = head_of(causal), causal.forward
        other = None if teacher is None else Teacher.of(teacher)
        balance = losses.load_balance
        active = 0 if balance is None else _active_experts(causal)

        def forward(
            self: PreTrainedModel,
            *args: Any,
            count: Tensor | None = None,
            labels: Tensor | None = None,
            document_ids: Tensor | None = None,
            kind_ids: Tensor | None = None,
            labels_aligned: bool = False,
            prefixes: Tensor | None = None,
            **inputs: Any,
        ) -> Any:
            if prefixes is not None:
                assert losses.sequence is not None
                return losses.sequence(self, prefixes, head=head)
            if count is None:
                return native(*args, labels=labels, **inputs)
            assert labels is not None
            base: Any = self.base_model
            short = None
            if losses.long_ce is not None:  # before the activations of the batch are there
                short = _short_context(self, losses.long_ce, head, inputs, labels, document_ids)
            routed = {} if balance is None else {"output_router_logits": True}
            output = base(*args, **inputs, **routed)
            hidden = output.last_hidden_state
            taught = None if other is None else (other, other.hidden(**inputs))
            linear = projection(self)
            if isinstance(linear, FSDPModule):
                linear.unshard()  # its own forward, which would do that, is never called
            wanted = torch.tensor(shares, device=count.device) * (count > 0)
            total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
            if balance is not None:
                real = None if document_ids is None else (document_ids != PADDING).flatten()
                learnt = (labels if labels_aligned else labels[:, 1:]) != IGNORED
                part = learnt.sum() / count.sum().clamp(min=1)  # of the update, in this batch
                even = balance(output.router_logits, active, real)
                total = total + balance.weight * part * even
            for kind, share in enumerate(wanted / wanted.sum().clamp(min=1e-9)):
                own = labels if kind_ids is None else labels.masked_fill(kind_ids != kind, IGNORED)
                loss = losses(
                    hidden,
                    linear.weight,
                    own,
                    bias=linear.bias,
                    head=head,
                    count=count[kind],
                    input_ids=inputs.get("input_ids"),
                    document_ids=document_ids,
                    labels_aligned=labels_aligned,
                    teacher=taught,
                    short=short,
                )
                total = total + share * loss.total
            return total

        # A bound method, since accelerate binds what it finds anew under autocast.
        causal.forward = MethodType(forward, causal)
        return cls(causal, native)

    def remove(self) -> None:
        """Give the model its own forward back, whatever was wrapped around it meanwhile."""
        for name in ("forward", "_original_forward"):
            self.model.__dict__.pop(name, None)


def _short_context(
    model: PreTrainedModel,
    long_ce: LongCE,
    head: Head,
    inputs: Mapping[str, Any],
    labels: Tensor,
    document_ids: Tensor | None,
) -> ShortContext:
    if document_ids is None:  # each row is one
        document_ids = torch.zeros_like(labels)
    ids, positions = inputs["input_ids"], inputs.get("position_ids")
    return long_ce.short_context(model, head, ids, positions, labels, document_ids)


def _active_experts(model: PreTrainedModel) -> int:
    """Experts that a token is sent to.

    Raises:
        ModelError: no mixture of experts that transformers gives the router's logits of.
    """
    config: Any = text_config(model)
    active: int | None = getattr(config, "num_experts_per_tok", None)
    if active is None or not hasattr(config, "output_router_logits"):
        raise ModelError(
            f"load balancing is for mixtures of experts, and model type {config.model_type!r} is "
            "none that gives its router's logits: leave it out (--load-balance)."
        )
    return active
