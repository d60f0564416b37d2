"""Experts out of a dense model (sparse upcycling): more weights, a few of them used per token.

    MLP(x)  →  Σ_{e in top k} p_e MLP_e(x),   p = softmax(W_r x) among the k,   MLP_e = MLP

Each MLP becomes E copies of itself behind a router with W_r ~ N(0, 0.02²). The weights of the
chosen k sum to 1, so the new model has the logits of the dense one, whatever the router says.
Training drives the copies apart; give it the load-balancing loss, without which a few experts take
all.

The model becomes one of transformers' own: Mixtral (from Llama, Mistral), Qwen2-MoE (from Qwen2,
its shared expert adding nothing at first) or Qwen3-MoE (from Qwen3). Other families are refused.

When to use it: you go on with pretraining and want more capacity at about k times the cost of the
MLPs. It is not for a short fine-tuning: the model starts no better than the dense one.

Source: Komatsuzaki et al. 2022, Sparse Upcycling (arXiv:2212.05055), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from longctx.attention.layers import attention_layers
from longctx.conversion import Calibration, Conversion, entries_of_family
from longctx.errors import MethodError, ModelError
from longctx.patch import Check
from longctx.twin import build_with_weights

__all__ = ["METHOD", "Moe"]

Family = Literal["auto", "mixtral", "qwen2_moe", "qwen3_moe"]

_FAMILIES: dict[str, Family] = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
}
"""What a dense family becomes."""
_PARTS = ("gate_proj", "up_proj", "down_proj")
_ROUTER_STD = 0.02


@dataclass(frozen=True, slots=True)
class Moe(Conversion):
    """Each MLP copied into experts behind a router."""

    experts: int = 8
    """Copies of each MLP."""
    active: int = 2
    """Experts that a token goes through."""
    family: Family = "auto"
    """The family of transformers that the model becomes."""
    seed: int = 0
    """Chooses the router's first weights."""

    name: ClassVar[str] = "moe"
    slots: ClassVar[tuple[str, ...]] = ("weights",)
    training: ClassVar[str] = (
        "nothing is off, and nothing is gained before it; experts part in a long training only, "
        "their load balanced (longctx train --recipe uptrain --distillation 0 "
        "--load-balance 0.001)"
    )

    def __post_init__(self) -> None:
        for field, least in (("experts", 2), ("active", 1), ("seed", 0)):
            if type(getattr(self, field)) is not int or getattr(self, field) < least:
                raise MethodError(
                    f"{self.name}: {field}={getattr(self, field)!r}: expected {least} or more."
                )
        if self.seed >= 2**63:
            raise MethodError(f"{self.name}: seed={self.seed}: expected less than 2**63.")
        if self.active > self.experts:
            raise MethodError(
                f"{self.name}: active={self.active} of experts={self.experts}: expected as many at "
                "most."
            )
        if self.family not in get_args(Family):
            raise MethodError(
                f"{self.name}: family={self.family!r}: expected {', '.join(get_args(Family))}."
            )

    @property
    def exact(self) -> bool:
        """Copies of one MLP say the same, whichever are chosen."""
        return True

    def convert(
        self, model: PreTrainedModel, calibration: Calibration | None
    ) -> tuple[PreTrainedModel, Sequence[Check]]:
        """Copy the MLPs into a model of the family."""
        del calibration
        prefixes = _dense_mlps(model)
        family = self._family(model)
        config = self._config(model, family)
        build: Any = AutoModelForCausalLM._model_mapping[type(config)]  # pyright: ignore[reportPrivateUsage]
        old = model.state_dict()
        weights = {
            name: weight.clone()
            for name, weight in old.items()
            if not any(name.startswith(f"{prefix}.") for prefix in prefixes)
        }
        generator = torch.Generator().manual_seed(self.seed)
        for prefix in prefixes:
            gate, up, down = (old[f"{prefix}.{part}.weight"] for part in _PARTS)
            both = torch.cat([gate, up])
            router = torch.randn(self.experts, gate.shape[1], generator=generator) * _ROUTER_STD
            weights |= {
                f"{prefix}.gate.weight": router.to(gate),
                f"{prefix}.experts.gate_up_proj": both.repeat(self.experts, 1, 1),
                f"{prefix}.experts.down_proj": down.repeat(self.experts, 1, 1),
            }
            if family == "qwen2_moe":  # 0 at first, by a matrix that a gradient reaches
                weights |= {
                    f"{prefix}.shared_expert.gate_proj.weight": gate.clone(),
                    f"{prefix}.shared_expert.up_proj.weight": up.clone(),
                    f"{prefix}.shared_expert.down_proj.weight": torch.zeros_like(down),
                    f"{prefix}.shared_expert_gate.weight": torch.zeros_like(gate[:1]),
                }
        try:
            made = build_with_weights(build, config, weights, {})
        except ModelError as error:
            raise ModelError(
                f"{self.name}: a {model.config.model_type!r} model is not a {family!r} model of "
                f"one expert: {error} Leave family=auto, or take another family."
            ) from error
        seen, sees = ([layer.window for layer in attention_layers(x)] for x in (model, made))
        if seen != sees:  # longer windows than the proof is would hide it
            raise ModelError(
                f"{self.name}: layers of this {model.config.model_type!r} model see the last "
                f"{_listed(seen)} tokens, and those of {family!r} would see {_listed(sees)}: leave "
                "family=auto, or convert another model."
            )
        return made, [Check("family", True, f"{model.config.model_type} → {family}")]

    def _family(self, model: PreTrainedModel) -> Family:
        known = _FAMILIES.get(model.config.model_type)
        if self.family != "auto":
            return self.family
        if known is None:
            raise ModelError(
                f"{self.name}: no family of experts is known that model type "
                f"{model.config.model_type!r} could become: expected {', '.join(_FAMILIES)}."
            )
        return known

    def _config(self, model: PreTrainedModel, family: Family) -> PreTrainedConfig:
        """The dense model's config in the words of the family."""
        own: dict[str, Any] = model.config.to_dict()
        said = entries_of_family(model.config, family)
        if family == "mixtral":
            said |= {
                "sliding_window": own.get("sliding_window"),
                "num_local_experts": self.experts,
            }
        else:
            inner = int(own["intermediate_size"])
            said |= {
                "num_experts": self.experts,
                "moe_intermediate_size": inner,
                "shared_expert_intermediate_size": inner,
                "norm_topk_prob": True,  # else the weights of the chosen do not sum to 1
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        if family == "qwen2_moe":
            said["qkv_bias"] = any(name.endswith("q_proj.bias") for name in model.state_dict())
        else:
            said.pop("shared_expert_intermediate_size", None)
        said["num_experts_per_tok"] = self.active
        return AutoConfig.for_model(family, **said, dtype=model.dtype)


def _listed(windows: Sequence[int | None]) -> str:
    return ", ".join("all" if window is None else f"{window:,}" for window in windows)


def _dense_mlps(model: PreTrainedModel) -> list[str]:
    """Names of the layers' MLPs.

    Raises:
        ModelError: experts already, or an MLP that is no gate, up and down.
    """
    layers: Any = getattr(model.get_decoder(), "layers", None) or []
    names = {id(module): name for name, module in model.named_modules()}
    found: list[str] = []
    for index, layer in enumerate(layers):
        mlp: Any = getattr(layer, "mlp", None) or getattr(layer, "block_sparse_moe", None)
        parts = {} if mlp is None else dict(mlp.named_children())
        if "experts" in parts:
            raise ModelError(
                f"model type {model.config.model_type!r} is a mixture of experts already (layer "
                f"{index}): expected a dense model."
            )
        plain = [isinstance(parts.get(name), nn.Linear) for name in _PARTS]
        if not all(plain) or any(parts[name].bias is not None for name in _PARTS):
            raise ModelError(
                f"moe copies an MLP of gate_proj, up_proj and down_proj without biases, and layer "
                f"{index} of model type {model.config.model_type!r} has "
                f"{', '.join(parts) or 'no mlp'}: expected {', '.join(_FAMILIES)}."
            )
        found.append(names[id(mlp)])
    if not found:
        raise ModelError(
            f"model type {model.config.model_type!r} has no layers that moe can reach: expected "
            f"{', '.join(_FAMILIES)}."
        )
    return found


METHOD = Moe
