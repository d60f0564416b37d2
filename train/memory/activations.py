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
from .model_spec import Linear, ModelSpec

__all__ = [
    "PrecisionPolicy",
    "attention_backward",
    "layer_backward",
    "loss_bytes",
    "outside",
    "saved",
]

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionPolicy:
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


def saved(spec: ModelSpec, policy: PrecisionPolicy) -> float:
    """Bytes per token that one layer keeps for backward.

    Float32, all weights, two norms: 4·(6h + 2q + 2k + 4i) + 4·(2 + heads).
    """
    c = policy.compute
    norms = sum(FLOAT * (w + 1) + policy.stream * w * policy.norms for w in spec.norms)
    attention = c * (2 * spec.query + 2 * spec.key_value) + FLOAT * spec.heads
    if any(x.name == "qkv_proj" for x in spec.linears):
        attention += c * (spec.query + spec.key_value)  # v keeps the whole product alive
    mlp = 3 * c * spec.inner
    trained = [x for x in spec.linears if policy.trains(x)]
    inputs = 0
    for block in ("attention", "mlp"):
        readers = [x for x in trained if x.block == block and x.first]
        if readers:
            inputs += c * spec.hidden * (len(readers) if policy.casts else 1)
    for linear in trained:
        # The kernel's output is the input of o_proj, unless something is in between: an adapter's
        # cast, or the documents of a packed row put together.
        between = (policy.casts and policy.rank) or policy.packed
        if not linear.first and (linear.name == "down_proj" or between):
            inputs += c * linear.inputs
    adapters = c * policy.rank * len(trained)
    return norms + attention + mlp + inputs + adapters


def outside(spec: ModelSpec, policy: PrecisionPolicy) -> float:
    """Bytes per token kept outside the layers: final norm, cos and sin, ids and positions."""
    norm = FLOAT * (spec.hidden + 1) + policy.stream * spec.hidden * policy.norms
    return norm + 2 * policy.stream * spec.query / spec.heads + 16


def layer_backward(spec: ModelSpec, policy: PrecisionPolicy) -> float:
    """Bytes per token that backward through a layer needs at its peak beyond what is kept.

    That is in the MLP's product act(gate)·up: gradients of it, of act(gate) and of up, and of what
    flows past in the residual, while the input of the last layer is free again.
    """
    freed = any(x.name == "down_proj" and policy.trains(x) for x in spec.linears)
    return (3 - freed) * policy.compute * spec.inner + policy.stream * spec.hidden


def attention_backward(spec: ModelSpec, policy: PrecisionPolicy, pieces: int) -> float:
    """The same in the attention, where a sequence is shared by `pieces` processes.

    Each gathers keys and values of all and their gradients (torch's ring attention by allgather,
    accelerate's default), when what the MLP kept is free again; Ulysses exchanges less.
    """
    own = 2 * spec.query + 2 * spec.key_value
    gathered = 4 * spec.key_value * pieces if pieces > 1 else 0
    freed = 3 * spec.inner
    return policy.compute * (own + gathered - freed) + 2 * policy.stream * spec.hidden


def loss_bytes(
    spec: ModelSpec, policy: PrecisionPolicy, rows: int, *, plain: bool, gathered: bool
) -> tuple[float, float]:
    """Bytes that the loss needs at its peak in forward and in backward, for `rows` tokens.

    Chunked (`loss/cross_entropy.py`): hidden states, those that are learnt, their gradient, and the
    logits of one chunk in float32. In half precision the gradient is made in backward, and a
    float32 head is copied unless FSDP has gathered it so. Plain: logits, their float32 copy,
    log-softmax; in backward log-softmax, the gradient of the picked rows and that of the logits.

    The gradient of the head is not counted here, but where all gradients are.
    """
    h, v, c = spec.hidden, spec.vocabulary, policy.compute
    hidden = policy.stream * h * rows
    copy = c * h * v * policy.head if policy.half and not gathered else 0
    if plain:
        float_copy = FLOAT * v * rows if policy.half else 0
        forward = hidden + (c + FLOAT) * v * rows + float_copy + copy
        return forward, hidden + 3 * FLOAT * v * rows + copy
    chunk = min(CHUNK, rows)
    logits = FLOAT * chunk * (v + h)
    if policy.half:
        backward = 2 * c * h * rows + logits + c * chunk * v + copy * 2
        return 2 * hidden + c * h * rows + logits + copy, backward
    return 3 * hidden + logits, 2 * hidden
