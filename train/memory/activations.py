"""Bytes per token that one update keeps and passes through, tensor by tensor.

Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models,
arXiv:2205.05198, section 4) count what a GPT layer keeps for backward; with recomputation of whole
layers their input is all that stays (section 5). Here their way of counting is applied to what
transformers' LLaMA is made of, as autograd saves it (tests/train/memory/test_planner.py asks it):

    attention   fused kernels keep q, k, v, their output and a log-sum-exp per head in float32
                (Dao 2023, FlashAttention-2, arXiv:2307.08691, section 3.1), never [S, S]; keys and
                values have as few heads as the model; RoPE keeps nothing but cos and sin, once
    RMSNorm     its input in float32, 1/rms, and where its weight is trained the normed input
    linear      its input, where its weight or adapter is trained: once for those that share it,
                but where autocast has to cast it, a half-precision copy for each
    gated MLP   gate, up, act(gate), and act(gate)·up as the input of the last layer
    residual    nothing

Legend: h hidden size, q and k widths of query and key heads, i width inside the MLP, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..loss.cross_entropy import CHUNK
from .model_spec import Anatomy, Linear

__all__ = ["Regime", "attention_backward", "layer_backward", "loss_bytes", "outside", "saved"]

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """What decides which tensors are kept, and in which precision."""

    compute: int
    """Bytes of each number that matrix products read: 2 under autocast, else 4."""
    stream: int
    """Bytes of each number between layers: 4 where embeddings are in float32."""
    casts: bool
    """Whether autocast casts what linear layers read; under FSDP it comes in half precision."""
    rank: int
    """Of the adapters; 0 where all weights are trained."""
    targets: tuple[str, ...]
    """Names of the adapted linear layers."""
    norms: bool
    """Whether norms are trained."""
    head: bool
    """Whether the head is trained."""
    packed: bool
    """Whether documents of a row are kept apart (`engine/packed_attention.py`)."""

    @property
    def half(self) -> bool:
        """Whether autocast is on."""
        return self.compute < FLOAT

    def trains(self, linear: Linear) -> bool:
        """Whether a linear layer's weight or adapter is trained."""
        return not self.rank or linear.name in self.targets


def saved(anatomy: Anatomy, regime: Regime) -> float:
    """Bytes per token that one layer keeps for backward.

    Float32, all weights, two norms: 4·(6h + 2q + 2k + 4i) + 4·(2 + heads).
    """
    c = regime.compute
    norms = sum(FLOAT * (w + 1) + regime.stream * w * regime.norms for w in anatomy.norms)
    attention = c * (2 * anatomy.query + 2 * anatomy.key_value) + FLOAT * anatomy.heads
    if any(x.name == "qkv_proj" for x in anatomy.linears):
        attention += c * (anatomy.query + anatomy.key_value)  # v keeps the whole product alive
    mlp = 3 * c * anatomy.inner
    trained = [x for x in anatomy.linears if regime.trains(x)]
    inputs = 0
    for block in ("attention", "mlp"):
        readers = [x for x in trained if x.block == block and x.first]
        if readers:
            inputs += c * anatomy.hidden * (len(readers) if regime.casts else 1)
    for linear in trained:
        # The kernel's output is the input of o_proj, unless something is in between: an adapter's
        # cast, or the documents of a packed row put together.
        between = (regime.casts and regime.rank) or regime.packed
        if not linear.first and (linear.name == "down_proj" or between):
            inputs += c * linear.inputs
    adapters = c * regime.rank * len(trained)
    return norms + attention + mlp + inputs + adapters


def outside(anatomy: Anatomy, regime: Regime) -> float:
    """Bytes per token kept outside the layers: final norm, cos and sin, ids and positions."""
    norm = FLOAT * (anatomy.hidden + 1) + regime.stream * anatomy.hidden * regime.norms
    return norm + 2 * regime.stream * anatomy.query / anatomy.heads + 16


def layer_backward(anatomy: Anatomy, regime: Regime) -> float:
    """Bytes per token that backward through a layer needs at its peak beyond what is kept.

    That is in the MLP's product act(gate)·up: gradients of it, of act(gate) and of up, and of what
    flows past in the residual, while the input of the last layer is free again.
    """
    freed = any(x.name == "down_proj" and regime.trains(x) for x in anatomy.linears)
    return (3 - freed) * regime.compute * anatomy.inner + regime.stream * anatomy.hidden


def attention_backward(anatomy: Anatomy, regime: Regime, pieces: int) -> float:
    """The same in the attention, where a sequence is shared by `pieces` processes.

    Each gathers keys and values of all and their gradients (torch's ring attention by allgather,
    accelerate's default), when what the MLP kept is free again; Ulysses exchanges less.
    """
    own = 2 * anatomy.query + 2 * anatomy.key_value
    gathered = 4 * anatomy.key_value * pieces if pieces > 1 else 0
    freed = 3 * anatomy.inner
    return regime.compute * (own + gathered - freed) + 2 * regime.stream * anatomy.hidden


def loss_bytes(
    anatomy: Anatomy, regime: Regime, rows: int, *, plain: bool, gathered: bool
) -> tuple[float, float]:
    """Bytes that the loss needs at its peak in forward and in backward, for `rows` tokens.

    Chunked (`loss/cross_entropy.py`): hidden states, those that are learnt, their gradient, and the
    logits of one chunk in float32. In half precision the gradient is made in backward, and a
    float32 head is copied unless FSDP has gathered it so. Plain: logits, their float32 copy,
    log-softmax; in backward log-softmax, the gradient of the picked rows and that of the logits.

    The gradient of the head is not counted here, but where all gradients are.
    """
    h, v, c = anatomy.hidden, anatomy.vocabulary, regime.compute
    hidden = regime.stream * h * rows
    copy = c * h * v * regime.head if regime.half and not gathered else 0
    if plain:
        float_copy = FLOAT * v * rows if regime.half else 0
        forward = hidden + (c + FLOAT) * v * rows + float_copy + copy
        return forward, hidden + 3 * FLOAT * v * rows + copy
    chunk = min(CHUNK, rows)
    logits = FLOAT * chunk * (v + h)
    if regime.half:
        backward = 2 * c * h * rows + logits + c * chunk * v + copy * 2
        return 2 * hidden + c * h * rows + logits + copy, backward
    return 3 * hidden + logits, 2 * hidden
