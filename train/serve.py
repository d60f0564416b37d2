"""The model of a finished run, written so that it serves as it was trained, and looked at again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from longctx.checkpoint import Saved, load, save
from longctx.core import patch_of
from longctx.errors import RunError
from longctx.model import text_config, window

from .folder import RunFolder

__all__ = ["model_card", "save_served"]

_PROBE = 32  # tokens whose logits are compared after reloading


def save_served(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
    done: Mapping[str, Any],
) -> Saved:
    """Write model, tokenizer and card, reload them, and compare logits.

    Raises:
        RunError: the disk refuses, or what was reloaded answers otherwise.
    """
    saved = save(model, tokenizer, folder.model)
    record: dict[str, Any] = json.loads(folder.run.read_text())
    (folder.model / "README.md").write_text(model_card(model, saved, record, done))
    off = _difference(model, saved)
    if not off <= 1e-4 * (1 if model.dtype == torch.float32 else 100):
        # Else the run would pass for finished.
        aside = folder.model.rename(folder.model.with_name("model-refused"))
        raise RunError(
            f"{aside}: reloaded, its logits are off by {off:.3g} (relative to their largest). Do "
            "not serve it; the run's checkpoints are whole."
        )
    return saved


def _difference(model: PreTrainedModel, saved: Saved) -> float:
    """Largest difference of logits after reloading, relative to the largest logit."""
    config: Any = text_config(model)
    again: Any
    if saved.plain:
        attention = config._attn_implementation
        again = AutoModelForCausalLM.from_pretrained(
            saved.path, dtype=model.dtype, attn_implementation=attention
        )
        again.to(model.device)
    else:
        again, _ = load(saved.path, device=str(model.device), dtype=str(model.dtype)[6:])  # pyright: ignore[reportArgumentType]
    size = int(config.vocab_size)
    ids = torch.arange(_PROBE, device=model.device)[None] * 7 % size
    training = model.training
    model.eval()
    again.eval()
    with torch.no_grad():
        here, there = (m(input_ids=ids, use_cache=False).logits.float() for m in (model, again))
    model.train(training)
    return float((here - there).abs().max() / here.abs().max())


def model_card(
    model: PreTrainedModel, saved: Saved, record: Mapping[str, Any], done: Mapping[str, Any]
) -> str:
    """The README of a checkpoint: what it was made from, and how it measured."""
    patch = patch_of(model)
    method = f"`{patch.method}`" if patch else "no change of positions"
    source = str(record["model"])
    source = Path(source).name if Path(source).is_dir() else source
    lines = [
        f"# {source}, read further",
        "",
        f"Made by longctx from `{source}`: {method}, a window of {window(model):,} "
        f"tokens, fine-tuned for {done['updates']:,} updates on {done['tokens']:,} tokens.",
        "",
        _loading(saved),
        "",
    ]
    if done["stopped"]:
        lines += [f"The run ended before its time: {done['stopped']}.", ""]
    if done["after"]:
        lines += ["| | before | after |", "|---|---|---|"]
        for name, after in done["after"].items():
            lines.append(f"| {name} | {done['before'].get(name, float('nan')):.4g} | {after:.4g} |")
        lines.append("")
    lines += ["## Settings", ""]
    lines += [f"- {name}: `{value}`" for name, value in record.items() if name != "model"]
    return "\n".join(lines) + "\n"


def _loading(saved: Saved) -> str:
    if saved.plain:
        return "It loads in plain transformers: `AutoModelForCausalLM.from_pretrained(folder)`."
    return (
        "Load it by `longctx.load(folder)`: plain transformers cannot express the method, and "
        "would load the unextended model."
    )
