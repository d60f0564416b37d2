"""Learning from another model's logits, without [N, vocab] logits of either.

    teacher = Teacher.of(original)
    hidden = teacher.hidden(input_ids=ids)                     # [B, S, D], no gradient
    nats = divergence(states, weight, bias, head, teacher, hidden.flatten(0, 1)[rows])

Legend: N rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from longctx.errors import RunError

from .cross_entropy import Head, anchor, head_of, prepared, projection, sum_chunks

__all__ = ["Distillation", "Teacher", "divergence"]

_CHUNK = 256  # rows whose logits there are at a time, of both models


@dataclass(frozen=True, slots=True)
class Distillation:
    """The original's distribution over the next token is learnt beside the token itself.

    (1 − α) · (−log p(x_t)) + α · T² · Σ_v q(v) (log q(v) − log p(v)),  q, p ∝ exp(logits / T)

    at each supervised token; q is the teacher's.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network (arXiv:1503.02531),
    section 2.
    """

    alpha: float = 0.5
    """α, the weight of the teacher, from above 0 to 1."""
    temperature: float = 1.0
    """T; above 1 the less probable tokens count for more."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise RunError(f"alpha={self.alpha} (--distillation): expected above 0, up to 1.")
        if not 0 < self.temperature < float("inf"):
            raise RunError(f"temperature={self.temperature}: expected a number above 0.")


@dataclass(frozen=True, slots=True)
class Teacher:
    """A model that is learnt from; it is not changed."""

    model: PreTrainedModel
    head: Head
    """What it does to its logits."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Teacher:
        """Look at its head.

        Raises:
            ModelError: a head that the chunked loss does not know.
        """
        return cls(model, head_of(model))

    @torch.no_grad()
    def hidden(self, **inputs: Any) -> Tensor:
        """Its last hidden states, [B, S, D]; it goes where the inputs are."""
        body: Any = self.model.base_model
        device = inputs["input_ids"].device
        if self.model.device != device:  # the trainer moved the model
            self.model.to(device)  # pyright: ignore[reportArgumentType]
        return body(**{**inputs, "use_cache": False}).last_hidden_state

    def log_probabilities(self, hidden: Tensor, temperature: float) -> Tensor:
        """Of the next token, [N, V], from hidden states [N, D]; without gradient."""
        linear = projection(self.model)
        with torch.no_grad():
            states, weight, bias = prepared(hidden, linear.weight, linear.bias)
            return (self.head.logits(states, weight, bias) / temperature).log_softmax(-1)


def divergence(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    teacher: Teacher,
    theirs: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = _CHUNK,
) -> Tensor:
    """Sum over rows of T² · KL(teacher ‖ model), in nats.

    Args:
        states: the model's last hidden states, [N, D].
        weight: of its head, [V, D].
        bias: of its head, [V].
        head: what it does to its logits.
        teacher: whose distribution is learnt.
        theirs: the teacher's last hidden states of the same tokens, [N, D'].
        temperature: T.
        chunk: rows at a time.

    Returns:
        A float32 scalar.

    Raises:
        RunError: the vocabularies differ.
    """
    states, weight, bias = prepared(states, weight, bias)
    size = projection(teacher.model).weight.shape[0]
    if size != weight.shape[0]:
        raise RunError(
            f"the teacher has {size:,} tokens and the model {weight.shape[0]:,}: expected the "
            "checkpoint that the model was made from."
        )
    if not len(states):
        return anchor(states, weight)

    def of_rows(rows: Tensor, other: Tensor) -> Tensor:
        mine = (head.logits(rows, weight, bias) / temperature).log_softmax(-1)
        wanted = teacher.log_probabilities(other, temperature)
        return functional.kl_div(mine, wanted, reduction="sum", log_target=True)

    return temperature**2 * sum_chunks(of_rows, chunk, states, theirs)
