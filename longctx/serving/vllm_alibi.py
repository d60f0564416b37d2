"""A LLaMA with linear biases in place of the rotary, for vLLM, which imports this file.

The slopes are those of vLLM's own BLOOM, which are ours: 2^(−8h/H) for heads h = 1 … H, and between
them where H is not a power of two.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.bloom import (
    _get_alibi_slopes,  # pyright: ignore[reportPrivateUsage]
)
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM

__all__ = ["AlibiLlamaForCausalLM"]


class _NoRotation(nn.Module):
    """Leaves queries and keys as they are."""

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, [tokens, heads · dimension] each."""
        del positions
        return q, k


class _AlibiAttention(LlamaAttention):
    """LLaMA's attention with a slope for each query head."""

    def __init__(self, *args: Any, cache_config: Any, quant_config: Any, prefix: str, **rest: Any):
        whole: dict[str, Any] = {
            "cache_config": cache_config,
            "quant_config": quant_config,
            "prefix": prefix,
        }
        super().__init__(*args, **whole, **rest)
        # The attention that was made above holds the name, and would be given a cache of its own.
        del get_current_vllm_config().compilation_config.static_forward_context[f"{prefix}.attn"]
        first = get_tensor_model_parallel_rank() * self.num_heads
        slopes = _get_alibi_slopes(self.total_num_heads)[first : first + self.num_heads]
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            alibi_slopes=slopes.tolist(),
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def _init_rotary_emb(self, config: Any, quant_config: Any) -> None:
        del config, quant_config
        self.rotary_emb = _NoRotation()


class _AlibiLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=_AlibiAttention)


class AlibiLlamaForCausalLM(LlamaForCausalLM):
    """What `LongctxAlibiLlamaForCausalLM` names in a saved checkpoint.

    Raises:
        ValueError: the checkpoint records other methods than ALiBi.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        record: Any = getattr(vllm_config.model_config.hf_config, "longctx", None) or {}
        names = [method.get("name") for method in record.get("methods", [])]
        if names != ["alibi"]:
            raise ValueError(
                f"{type(self).__name__} serves checkpoints that longctx saved under alibi, and "
                f"this one records {names}: serve it as the architecture that it is of."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_AlibiLayer)
