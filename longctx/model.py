"""Where a transformers model keeps its rotary, its attention modules and its positions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .config_windows import WINDOW_KEYS
from .errors import ModelError
from .quiet import without_messages
from .rope import YARN_EXTRAS, Rope, ScaledRotary, carried_entries, frequencies_of

__all__ = [
    "attention_modules",
    "build_rotary",
    "declare_window",
    "decoder_of",
    "evaluating",
    "learned_positions",
    "original_length",
    "put_rope_parameters",
    "put_rotary",
    "refusal",
    "rope_entry",
    "rope_of",
    "rotary_of",
    "scaled_rope",
    "text_config",
    "unwrapped",
    "window",
    "with_rope_entry",
]

_FULL = "full_attention"


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT, `torch.compile` and data-parallel wrappers.

    Raises:
        ModelError: no transformers model, or adapters that act outside of it (prompt learning).
    """
    while not isinstance(model, PreTrainedModel):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ModelError(
                "the adapter learns a prompt, which stands before the model and not inside it: "
                "longctx looks through adapters of layers (LoRA) only."
            )
        modules = getattr(model, "_modules", {})
        # PeftModel.base_model is a tuner, whose `model` is ours.
        inner = next(
            (
                module
                for name in ("_orig_mod", "module", "base_model", "model")
                if isinstance(module := modules.get(name), nn.Module)
            ),
            None,
        )
        if inner is None:
            raise ModelError(
                f"expected a transformers model (PreTrainedModel), got {type(model).__name__}."
            )
        model = inner
    return model


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Switch dropout off, and put each module's own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the text decoder, also inside a multimodal model."""
    return model.config.get_text_config(decoder=True)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that holds `rotary_emb` and the layers.

    Raises:
        ModelError: the model keeps no rotary at model level (learned positions, ALiBi, or a
            rotary inside each attention module).
    """
    decoder: nn.Module = model.get_decoder()
    # Llama-4's text model names itself its decoder, and keeps that under `model`.
    for found in (decoder, getattr(decoder, "model", None)):
        if isinstance(found, nn.Module) and isinstance(
            getattr(found, "rotary_emb", None), nn.Module
        ):
            return found
    raise ModelError(
        f"model type {model.config.model_type!r} has no reachable rotary: expected a decoder with "
        f"`rotary_emb` at model level (Llama, Mistral, Qwen2, Qwen3, Gemma-3, Phi-3, OLMo-2, …), "
        f"found {type(decoder).__name__}. It cannot be extended; it can still be measured."
    )


def rotary_of(model: PreTrainedModel) -> nn.Module:
    """The rotary in place on the model."""
    return decoder_of(model).get_submodule("rotary_emb")


def put_rotary(
    model: PreTrainedModel, rotary: nn.Module, put: Callable[[Any, str, Any], None]
) -> None:
    """Put a rotary in place.

    Granite-SWA builds a rotary for each base in `layer_rope_theta`, and reads those.

    Args:
        model: whose layers are to read it.
        rotary: of the model's present config.
        put: sets an attribute, as `Patch.set` does.
    """
    decoder = decoder_of(model)
    put(decoder, "rotary_emb", rotary)
    by_base: nn.ModuleList | None = getattr(decoder, "rotary_embs", None)
    if by_base is not None:
        put(by_base, "0", rotary)


def _nested(parameters: dict[str, Any]) -> bool:
    return "rope_type" not in parameters and _FULL in parameters


def rope_entry(config: PreTrainedConfig) -> tuple[dict[str, Any], str | None]:
    """The `rope_parameters` to extend and the layer type they belong to (None where flat).

    Models with parameters per layer type (Gemma-3) are extended in their full-attention layers:
    the sliding ones never see further than their window.
    """
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if _nested(parameters) and parameters[_FULL]:
        return parameters[_FULL], _FULL
    if _nested(parameters):
        raise ModelError(
            f"the full-attention layers of {config.model_type!r} have no rotary, and the others "
            f"slide over {getattr(config, 'sliding_window', None)} tokens: there are no positions "
            "to extend. It can still be measured."
        )
    if "rope_theta" not in parameters or parameters["rope_theta"] is None:
        raise ModelError(
            f"config.rope_parameters of {config.model_type!r} is {parameters!r}: expected at least "
            "a 'rope_theta'. `longctx doctor` says how to mend a checkpoint."
        )
    return parameters, None


def with_rope_entry(config: PreTrainedConfig, entry: dict[str, Any]) -> dict[str, Any]:
    """A copy of `config.rope_parameters` in which the extended entry is replaced."""
    parameters: dict[str, Any] = config.rope_parameters
    return {**parameters, _FULL: entry} if _nested(parameters) else entry


def put_rope_parameters(
    config: PreTrainedConfig,
    parameters: dict[str, Any] | None,
    put: Callable[[Any, str, Any], None],
) -> None:
    """Set `rope_parameters`, and the base where the config says it for each layer too.

    Args:
        config: of the text decoder.
        parameters: all of them, nested where the family nests them.
        put: sets an attribute, as `Patch.set` does.
    """
    put(config, "rope_parameters", parameters)
    bases: list[float] | None = getattr(config, "layer_rope_theta", None)
    if bases and parameters:
        put(config, "layer_rope_theta", [base and parameters["rope_theta"] for base in bases])


def refusal(config: PreTrainedConfig, entry: dict[str, Any], length: int) -> str | None:
    """Why this model's config class refuses such `rope_parameters`, None if it takes them.

    Phi-3's, for one, takes nothing but longrope.

    Args:
        config: of the text model.
        entry: complete `rope_parameters`.
        length: the window that goes with them, in tokens.
    """
    trial: Any = copy.copy(config)
    trial.max_position_embeddings = length
    trial.rope_parameters = with_rope_entry(config, entry)
    try:
        with without_messages("transformers.modeling_rope_utils", "long_mscale"):  # vLLM's keys
            trial.validate_rope()
    except (ValueError, KeyError, TypeError) as error:
        return str(error)
    return None


def scaled_rope(config: PreTrainedConfig) -> str | None:
    """The scaling that a config already carries ("yarn", "llama3", …), None for plain RoPE."""
    entry, _ = rope_entry(config)
    rope_type = entry.get("rope_type", "default")
    return None if rope_type == "default" else rope_type


def rope_of(model: PreTrainedModel) -> Rope:
    """The geometry that the model was trained with, whatever scaling its config adds to it.

    L is `original_max_position_embeddings` where the scaling records it, the window divided by the
    factor for linear scaling, else `max_position_embeddings`.

    Raises:
        ModelError: no reachable rotary, or one whose frequencies are not b^(−2i/d).
    """
    rotary = rotary_of(model)
    config = text_config(model)
    entry, layer_type = rope_entry(config)
    bases = {base for base in getattr(config, "layer_rope_theta", None) or () if base}
    if bases and bases != {entry["rope_theta"]}:
        raise ModelError(
            f"model type {config.model_type!r} turns its layers by the bases {sorted(bases)} "
            f"(layer_rope_theta), and rope_theta is {entry['rope_theta']:g}: longctx extends one "
            "base, which both must say. It can still be measured."
        )
    if layer_type is not None and layer_type not in (getattr(config, "layer_types", None) or ()):
        raise ModelError(
            f"all layers of this {config.model_type!r} model slide over "
            f"{getattr(config, 'sliding_window', None)} tokens: none sees further, whatever is "
            "done to the positions. It cannot be extended; it can still be measured."
        )
    try:
        inv_freq, _ = frequencies_of(rotary, layer_type)
    except AttributeError as error:
        raise ModelError(
            f"{type(rotary).__name__} of model type {config.model_type!r} keeps no `inv_freq`: "
            "longctx cannot extend it."
        ) from error
    # To `proportional` it is the share of planes that turn, and the whole head is rotated.
    proportional = entry.get("rope_type") == "proportional"
    rope = Rope(
        dim=2 * inv_freq.numel(),
        theta=float(entry["rope_theta"]),
        length=original_length(config, entry),
        partial_rotary_factor=None if proportional else entry.get("partial_rotary_factor"),
        layer_type=layer_type,
        carried=carried_entries(entry),
        yarn={k: entry[k] for k in YARN_EXTRAS if k in entry and entry.get("rope_type") == "yarn"},
    )
    if entry.get("rope_type", "default") == "default":
        # Loose, since a model that was cast has rounded frequencies; another formula is far off.
        wanted = rope.inv_freq()
        if not torch.allclose(inv_freq.double().cpu(), wanted, rtol=2e-2, atol=1e-5):
            raise ModelError(
                f"the rotary of model type {config.model_type!r} does not follow "
                f"rope_theta^(-2i/d) with rope_theta={rope.theta:g} and d={rope.dim}: its "
                "frequencies are another design, which longctx does not extend."
            )
    return rope


def original_length(config: PreTrainedConfig, entry: dict[str, Any]) -> int:
    """Tokens that were trained, before the scaling that a config's RoPE entry says."""
    if "original_max_position_embeddings" in entry:
        return int(entry["original_max_position_embeddings"])
    scaled = entry["factor"] if entry.get("rope_type") == "linear" else 1
    return int(config.max_position_embeddings / scaled)


def build_rotary(model: PreTrainedModel, layer_type: str | None) -> nn.Module:
    """A new rotary of the model's own class, from the model's present config, on its device."""
    config = text_config(model)
    current = rotary_of(model)
    native_class: Any = type(current.native if isinstance(current, ScaledRotary) else current)
    inv_freq, _ = frequencies_of(current, layer_type)
    try:
        return native_class(config=config).to(inv_freq.device)
    except (TypeError, KeyError) as error:
        raise ModelError(
            f"{native_class.__name__} cannot be built from rope_parameters "
            f"{config.rope_parameters!r}: {error}. This model type supports no such scaling."
        ) from error


def attention_modules(model: PreTrainedModel) -> list[tuple[int, nn.Module, str | None]]:
    """(layer index, self-attention module, layer type or None) of every decoder layer.

    Raises:
        ModelError: a layer has no `self_attn` that goes through transformers' attention interface.
    """
    config = text_config(model)
    layers: Any = getattr(decoder_of(model), "layers", None)
    types: list[str] | None = getattr(config, "layer_types", None)
    found = [
        (index, getattr(layer, "self_attn", None), types[index] if types else None)
        for index, layer in enumerate(layers or [])
    ]
    supported = bool(getattr(model, "_supports_attention_backend", False))
    if not supported or not found or any(module is None for _, module, _ in found):
        raise ModelError(
            f"model type {config.model_type!r} does not route its attention through transformers' "
            "attention interface: methods that change attention cannot reach it; those that change "
            "frequencies may (`longctx methods`)."
        )
    return [(index, module, kind) for index, module, kind in found if module is not None]


def declare_window(
    model: PreTrainedModel, before: PreTrainedConfig, put: Callable[[Any, str, Any], None]
) -> None:
    """Let further keys that say the old window follow `max_position_embeddings`.

    Servers take the smallest of them (vLLM), and `generate` stops at its config's `max_length`.

    Args:
        model: with the new window in its config.
        before: the text config as it was.
        put: sets an attribute and remembers what was there, as `Patch.set` does.
    """
    old, new = (getattr(c, "max_position_embeddings", None) for c in (before, text_config(model)))
    if old == new:
        return
    generation: Any = getattr(model, "generation_config", None)
    for config in (text_config(model), model.config, generation):
        for key in (*WINDOW_KEYS, "max_length"):  # the last is that of generation
            if config is not None and vars(config).get(key) == old:
                put(config, key, new)


def window(model: PreTrainedModel) -> int | None:
    """Tokens the config promises (`max_position_embeddings`), None if it names none."""
    length: Any = getattr(text_config(model), "max_position_embeddings", None)
    return None if length is None else int(length)


def learned_positions(model: PreTrainedModel) -> int | None:
    """Size of a learned position table in tokens (GPT-2, OPT), a hard limit; else None."""
    names = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in names:
            return module.num_embeddings - int(getattr(module, "offset", 0))
    return None
