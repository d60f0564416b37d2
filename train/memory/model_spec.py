"""Count what a decoder is made of, on the meta device: no weights are read and no memory is taken.

    spec = ModelSpec.of(config)                      # or a model, or a checkpoint's name
    spec.parameters, spec.hidden, spec.linears

For decoders of equal layers with a gated MLP: Llama, Mistral, Qwen2, Qwen3, Gemma-2 and 3, Phi-3,
OLMo-2, Granite, SmolLM3.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longctx import checkpoint
from longctx.errors import ModelError
from longctx.model import text_config, window

from ..parallel.compatibility import has_sliding_layers

__all__ = ["Linear", "ModelSpec", "norm_layers", "on_meta", "read_config"]

_OUT = ("o_proj", "down_proj")  # the last linear layers of attention and MLP in these families


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer inside a decoder layer."""

    name: str
    """The last part of its name: q_proj, …"""
    block: str
    """"attention" or "mlp"."""
    inputs: int
    """Width of its input, in numbers per token."""
    outputs: int
    """Width of its output, in numbers per token."""

    @property
    def first(self) -> bool:
        """Whether it reads the block's input, which its neighbours then read too."""
        return self.name not in _OUT

    @property
    def weights(self) -> int:
        """Numbers in its matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of a decoder; widths are in numbers per token, the rest in parameters."""

    name: str
    """Of the checkpoint, as it was given, or the model type."""
    layers: int
    hidden: int
    query: int
    """Width of all query heads together."""
    key_value: int
    """Width of all key heads together, and of all value heads."""
    inner: int
    """Width between the MLP's two halves."""
    heads: int
    """Query heads."""
    kv_heads: int
    vocabulary: int
    window: int | None
    """Tokens that the config promises."""
    sliding: bool
    """Whether layers see a stretch of the sequence alone."""
    linears: tuple[Linear, ...]
    """Of one layer."""
    norms: tuple[int, ...]
    """Widths of one layer's norms, in numbers per token."""
    layer: int
    """Parameters of one layer."""
    embedding: int
    """Parameters of the embedding."""
    head: int
    """Parameters of the head; 0 where it is tied to the embedding."""
    rest: int
    """All other parameters: the final norm, biases of the head, a vision tower."""
    norm_parameters: int
    """Parameters of all norms, part of the above."""
    largest: int
    """Parameters in the largest tensor."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer + self.embedding + self.head + self.rest

    @classmethod
    def of(cls, source: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel) -> ModelSpec:
        """Count.

        Args:
            source: a model, its config, or what `longctx.load` takes: of a checkpoint the config
                alone is read, and nothing in it is executed.

        Raises:
            ModelError: not a decoder of equal layers with a gated MLP, or no such checkpoint.
        """
        name = str(source) if isinstance(source, (str, os.PathLike)) else ""
        if isinstance(source, PreTrainedModel):
            model: Any = source
        else:
            is_config = isinstance(source, PreTrainedConfig)
            config: PreTrainedConfig = source if is_config else read_config(source)  # pyright: ignore[reportAssignmentType, reportArgumentType]
            model = on_meta(config)
        text: Any = text_config(model)
        layers = _layers(model)
        linears = _linears(layers[0], text.model_type)
        own = {id(p): p for p in model.parameters()}
        embedding = model.get_input_embeddings().weight
        head = model.get_output_embeddings().weight
        tied = head is embedding or bool(text.tie_word_embeddings)
        heads = int(text.num_attention_heads)
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        layer = _count(layers[0])
        if any(_count(other) != layer for other in layers):
            raise _unknown(text.model_type, "layers of different sizes")
        total = sum(p.numel() for p in own.values())
        total -= head.numel() if tied and head is not embedding else 0
        counted = len(layers) * layer + embedding.numel() + (0 if tied else head.numel())
        return cls(
            name=name or str(model.name_or_path) or str(text.model_type),
            layers=len(layers),
            hidden=int(text.hidden_size),
            query=heads * dim,
            key_value=kv_heads * dim,
            inner=next(x.inputs for x in linears if x.name == "down_proj"),
            heads=heads,
            kv_heads=kv_heads,
            vocabulary=int(head.shape[0]),
            window=window(model),
            sliding=has_sliding_layers(text),
            linears=linears,
            norms=tuple(_norm_widths(layers[0], int(text.hidden_size), heads, kv_heads, dim)),
            layer=layer,
            embedding=embedding.numel(),
            head=0 if tied else head.numel(),
            rest=total - counted,
            norm_parameters=sum(_count(norm) for _, norm in norm_layers(model)),
            largest=max(p.numel() for p in own.values()),
        )


def read_config(source: str | os.PathLike[str]) -> PreTrainedConfig:
    """The config of a checkpoint folder, hub id, GGUF file or "demo", and nothing else of it.

    Raises:
        ModelError: nothing there, or a config that asks for code of its own.
    """
    path = checkpoint.locate(source)
    gguf = isinstance(path, Path) and path.suffix == ".gguf"
    try:
        if gguf:
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)  # pyright: ignore[reportAttributeAccessIssue]
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # readers fail in as many ways as a file can be broken
        raise ModelError(
            f"cannot read the config of {str(source)!r}: {error}. Expected a checkpoint that "
            "longctx.load takes."
        ) from error


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a config without its weights.

    Raises:
        ModelError: its family cannot be built so.
    """
    config = copy.deepcopy(config)  # building writes into it
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"no decoder can be built from a config of model type {config.model_type!r}: {error}"
        ) from error


def _layers(model: Any) -> list[nn.Module]:
    layers = getattr(model.get_decoder(), "layers", None)
    if not layers or any(not hasattr(x, "self_attn") or not hasattr(x, "mlp") for x in layers):
        raise _unknown(model.config.model_type, "layers without `self_attn` and `mlp`")
    return list(layers)


def _linears(layer: Any, model_type: str) -> tuple[Linear, ...]:
    found = tuple(
        Linear(name.rpartition(".")[2], block, module.in_features, module.out_features)
        for block, part in (("attention", layer.self_attn), ("mlp", layer.mlp))
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear)
    )
    # What is neither a norm nor a linear layer (experts, convolutions) would go uncounted.
    strange = _count(layer) - sum(_count(m) for _, m in norm_layers(layer))
    strange -= sum(_count(m) for m in layer.modules() if isinstance(m, nn.Linear))
    down = [x for x in found if x.name == "down_proj"]
    into = sum(x.outputs for x in found if x.block == "mlp" and x.first)
    if strange or len(down) != 1 or into != 2 * down[0].inputs:
        raise _unknown(model_type, "an MLP that is not gated, or experts")
    return found


def norm_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of all norms inside, known by the name of their class.

    They have as many names as there are families (q_norm, ln_f, …); their classes agree.
    """
    return [
        (name, part)
        for name, part in module.named_modules()
        if "norm" in type(part).__name__.lower() and next(part.parameters(False), None) is not None
    ]


def _norm_widths(layer: nn.Module, hidden: int, heads: int, kv_heads: int, dim: int) -> list[int]:
    widths = {"q_norm": heads * dim, "k_norm": kv_heads * dim}
    return [widths.get(name.rpartition(".")[2], hidden) for name, _ in norm_layers(layer)]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _unknown(model_type: str, what: str) -> ModelError:
    return ModelError(
        f"model type {model_type!r} has {what}, whose memory this planner does not know: expected "
        "equal layers with a gated MLP (Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3, OLMo-2). Run "
        "one update (--max-steps 1) and look at the peak."
    )
