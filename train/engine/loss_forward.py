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

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from longctx.model import unwrapped

from ..data.tokenize import IGNORED
from ..loss.cross_entropy import head_of, projection
from ..loss.objective import Losses

__all__ = ["LossForward"]


@dataclass(slots=True)
class LossForward:
    """The loss in place on one model."""

    model: PreTrainedModel
    native: Callable[..., Any]
    """The model's own forward."""

    @classmethod
    def on(cls, model: Any, losses: Losses, shares: tuple[float, ...] = (1.0,)) -> LossForward:
        """Install the loss forward.

        Args:
            model: patched or not, or a PEFT model around one.
            losses: what is minimised.
            shares: of the loss, for each kind of document (`kind_ids`); each kind's tokens are
                averaged apart. A kind without any token in an update gives its share to the others.

        Raises:
            ModelError: a head that the chunked loss does not know.
        """
        causal = unwrapped(model)
        head, native = head_of(causal), causal.forward

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
            hidden = base(*args, **inputs).last_hidden_state
            linear = projection(self)
            if isinstance(linear, FSDPModule):
                linear.unshard()  # its own forward, which would do that, is never called
            wanted = torch.tensor(shares, device=count.device) * (count > 0)
            total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
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
