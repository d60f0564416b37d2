"""Where and how a command runs a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DeviceOptions"]


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """Device, precision and attention kernel."""

    device: str = "auto"
    """"auto": the GPUs there are (large models spread over them; under torchrun each process has
    its own), else CPU; or cuda:0, cpu, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto": bfloat16 on a GPU, float32 on a CPU."""
    attn: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    """"auto": flash-attn on a GPU where it is installed, else SDPA."""
    trust_remote_code: bool = False
    """Run Python that the checkpoint brings along."""

    def load(self, source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load a model and its tokenizer; see `longctx.load`."""
        from ..checkpoint import load

        _silence_loading()
        device = self.device
        if device == "auto" and "LOCAL_RANK" in os.environ:  # each process of a node its own GPU
            import torch

            device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
        return load(
            source,
            device=device,
            dtype=self.dtype,
            attn=self.attn,
            trust_remote_code=self.trust_remote_code,
        )


def _silence_loading() -> None:
    """Keep transformers' bars of reading weights from stderr, and those of downloads on it."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads_shown = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads_shown:
        enable_progress_bars()
