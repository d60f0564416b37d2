"""Turning by the model's own rotary: both pairings of channels, partial rotaries, far positions."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from longctx.attention import turning
from longctx.attention.hook import NAME
from longctx.attention.layers import attention_layers
from longctx.attention.probing import probe_turning
from longctx.attention.turning import Framing, Rotation
from longctx.errors import ModelError
from longctx.model import rotary_of

HEAD_DIM = 16
FAMILIES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "llama": ("Llama", {}, "halves", 16),
    "qwen3": ("Qwen3", {}, "halves", 16),
    "phi3": ("Phi3", {}, "halves", 16),
    "phi3, half": ("Phi3", {"partial_rotary_factor": 0.5}, "halves", 8),
    "phi, quarter": ("Phi", {"partial_rotary_factor": 0.25}, "halves", 4),
    "cohere": ("Cohere", {}, "neighbours", 16),
    "ernie4_5": ("Ernie4_5", {}, "neighbours", 16),
    "glm": ("Glm", {"partial_rotary_factor": 0.5}, "neighbours", 8),
}
"""Class, what is set beside the usual, how channels pair up, and how many of 16 turn."""


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    name, changes, _, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=96,
        hidden_size=4 * HEAD_DIM,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **changes,
    )
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def rotation_of(family: str, dtype: torch.dtype = torch.float32) -> Rotation:
    model = build(family, dtype)
    return Rotation(model, None, attention_layers(model)[0].module)


def by_formula(x: Tensor, positions: Tensor, family: str) -> Tensor:
    """Float64: θᵢ = b^(−2i/D) over the D channels that turn."""
    _, _, pairing, width = FAMILIES[family]
    planes = torch.arange(0, width, 2, dtype=torch.float64)
    base = 5e5 if pairing == "neighbours" and family != "glm" else 1e4  # what their configs say
    phase = positions[:, None] * base ** (-planes / width)
    out = x.double().clone()
    one, other = slice(0, width // 2), slice(width // 2, width)
    if pairing == "neighbours":
        one, other = slice(0, width, 2), slice(1, width, 2)
    a, b = x[..., one].double(), x[..., other].double()
    out[..., one] = a * phase.cos() - b * phase.sin()
    out[..., other] = b * phase.cos() + a * phase.sin()
    return out


def vectors(tokens: int = 9, batch: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, tokens, 3, HEAD_DIM, generator=g).transpose(1, 2)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turning, "_CHUNK", 4 * 2 * 3 * HEAD_DIM)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", FAMILIES)
def test_turned_as_the_formula_says(family: str) -> None:
    rotation = rotation_of(family)
    assert rotation.pairing == FAMILIES[family][2]
    positions = torch.tensor([0, 1, 5, -3, 0.25, 63, -40, 2, 7], dtype=torch.float64)
    x = vectors()
    wanted = by_formula(x, positions, family)
    phases = rotation.phases(positions)
    torch.testing.assert_close(rotation.turn(x, phases).double(), wanted, rtol=0, atol=4e-6)
    odd = torch.randn(2, 3, 9, HEAD_DIM + 1)[..., 1:].copy_(x)
    torch.testing.assert_close(rotation.turn(odd, phases).double(), wanted, rtol=0, atol=4e-6)
    exact = rotation.turn(x.double(), phases)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_turned_as_the_model_does_it(family: str) -> None:
    """With its function, as for a model whose pairing is not known."""
    rotation = rotation_of(family)
    positions = torch.arange(9, dtype=torch.float64)
    ours = rotation.turn(vectors(), rotation.phases(positions))
    rotation.pairing = None
    theirs = rotation.turn(vectors(), rotation.phases(positions))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", ["llama", "cohere", "glm"])
def test_the_gradient_turns_back(family: str) -> None:
    rotation = rotation_of(family)
    positions = torch.arange(9, dtype=torch.float64) * 3
    x, upstream = vectors().requires_grad_(), vectors().flip(2)
    rotation.turn(x, rotation.phases(positions)).backward(upstream)
    assert x.grad is not None
    wanted = by_formula(upstream, -positions, family)
    torch.testing.assert_close(x.grad.double(), wanted, rtol=0, atol=4e-6)


def test_an_unknown_pairing_is_left_to_the_model() -> None:
    model = build("llama")
    module = attention_layers(model)[0].module
    rotation = Rotation(model, None, module)

    def reversed_pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos[:, None], sin[:, None]
        return tuple(x * cos + x.flip(-1) * sin for x in (q, k))  # type: ignore[return-value]

    assert turning._pairing(reversed_pairs, rotation.planes) is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turning_twice_by_half_is_found_in_whole_models(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype)
    layers = attention_layers(model)
    found = probe_turning(model, layers, Rotation(model, None, layers[0].module))
    assert found.turning == (*layers,)
    assert not found.still
    assert found.difference < (1e-5 if dtype == torch.float32 else 1e-2)


def test_a_model_in_bfloat16_turns_in_float32() -> None:
    rotation = rotation_of("llama", torch.bfloat16)
    x = vectors().bfloat16()
    positions = torch.arange(9, dtype=torch.float64) * 7
    out = rotation.turn(x, rotation.phases(positions))
    assert out.dtype == torch.bfloat16
    frequencies: Any = rotary_of(build("llama", torch.bfloat16)).inv_freq
    assert frequencies.dtype == torch.float32
    exact = by_formula(x, positions, "llama")
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("position", [1e6, 1e6 + 0.5, 2.0**24 + 1])
def test_phases_far_away_are_of_float64(position: float) -> None:
    rotation = rotation_of("llama")
    cos, sin = rotation.cos_sin(torch.tensor([position], dtype=torch.float64))
    frequencies: Any = rotary_of(build("llama")).inv_freq
    for plane, frequency in enumerate(frequencies.tolist()):
        phase = math.fmod(position * frequency, 2 * math.pi)
        for channel in (plane, plane + HEAD_DIM // 2):
            assert abs(cos[0, channel].item() - math.cos(phase)) < 1e-7
            assert abs(sin[0, channel].item() - math.sin(phase)) < 1e-7


def under_our_attention(rotation: Rotation) -> Rotation:
    """The same of a model that runs the attention which a frame is made for."""
    config: Any = rotation.decoder.config
    config._attn_implementation_internal = NAME
    return rotation


def test_a_frame_stands_in_for_positions() -> None:
    rotation = under_our_attention(rotation_of("llama"))
    framing = Framing(rotation, lambda positions: (positions / 3).floor())
    ids = torch.arange(9)[None]
    native = rotary_of(build("llama"))(torch.zeros(1), ids)
    passed = {"position_embeddings": native, "position_ids": ids}
    found: Any = framing(nn.Module(), (), passed)
    cos, sin = found[1]["position_embeddings"]
    for x, native_x in ((cos, native[0]), (sin, native[1])):
        torch.testing.assert_close(x, native_x[:, ids[0] // 3], rtol=0, atol=1e-6)
    assert framing(nn.Module(), (), passed)[1]["position_embeddings"][0] is cos  # type: ignore
    with framing.suspended():
        assert framing(nn.Module(), (), passed) is None


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ({"position_ids": torch.arange(3)[None]}, "not handed position_embeddings"),
        (
            {
                "position_embeddings": (torch.ones(1, 3, 16), torch.ones(1, 3, 16)),
                "position_ids": torch.zeros(3, 1, 3),
            },
            r"expected \[batch, seq\]",
        ),
    ],
)
def test_a_frame_needs_what_the_layer_is_handed(passed: dict[str, Any], message: str) -> None:
    framing = Framing(under_our_attention(rotation_of("llama")), lambda positions: positions)
    with pytest.raises(ModelError, match=message):
        framing(nn.Module(), (), passed)


def test_a_module_without_the_function_is_refused() -> None:
    with pytest.raises(ModelError, match="no apply_rotary_pos_emb beside Linear"):
        Rotation(build("llama"), None, nn.Linear(2, 2))
