"""Tiny random models, one per family, small enough that every method can be tried on each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

WINDOW = 64
VOCABULARY = 96


def build(family: str, **changes: object) -> Any:
    """A two-layer model with a window of 64 tokens and grouped key/value heads, always the same."""
    classes: dict[str, tuple[Any, Any]] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
        "phi3": (Phi3Config, Phi3ForCausalLM),
        "olmo2": (Olmo2Config, Olmo2ForCausalLM),
        "cohere": (CohereConfig, CohereForCausalLM),
        "glm": (GlmConfig, GlmForCausalLM),
        "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
    }
    config_class, model_class = classes[family]
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": WINDOW,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "gemma3":
        settings |= {
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        }
    if family == "cohere":  # else its base is that of abf's example
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    if family == "glm":  # which turns half of the head
        settings["head_dim"] = 32
    if family == "smollm3":  # the second layer has no rotary
        settings["no_rope_layers"] = [1, 0]
    if family == "mistral":
        settings["sliding_window"] = None
    if family == "phi3":
        settings["original_max_position_embeddings"] = WINDOW
    torch.manual_seed(0)
    return model_class(config_class(**settings | changes)).eval()


def tokens(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random ids [batch, length] without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)
