"""The model of a finished run, written so that it serves as it was trained, and looked at again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from longctx.attention.remapped import needs_consecutive_positions
from longctx.checkpoint import Saved, load, save
from longctx.errors import RunError
from longctx.model import text_config, window
from longctx.patch import methods_of

from .run_folder import RunFolder

__all__ = ["difference", "model_card", "probe", "save_served"]

_PROBE = 32  # tokens whose logits are compared, at the window's start and all over it


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
    # Under its name it would pass for finished, whatever happened before it was looked at.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the message that is returned says it
        saved = save(model, tokenizer, folder.unchecked, overwrite=True)
    record = folder.read()
    off = _difference(model, saved)
    if not off <= 1e-4 * (1 if model.dtype == torch.float32 else 100):
        raise RunError(
            f"{saved.path}: reloaded, its logits are off by {off:.3g} (relative to their largest; "
            "inf: its window is another; nan: its weights are NaN or infinite). Do not serve it."
        )
    message = saved.message.replace(str(saved.path), str(folder.model))
    saved = replace(saved, path=folder.model, message=message)
    try:
        card = model_card(model, saved, record, done)
        (folder.unchecked / "README.md").write_text(card, encoding="utf-8")
        folder.unchecked.rename(folder.model)
    except OSError as error:
        raise RunError(
            f"cannot write {folder.model}: {error}. Make room and pass resume (--resume)."
        ) from error
    return saved


def _difference(model: PreTrainedModel, saved: Saved) -> float:
    """Largest difference of logits after reloading, relative to the largest logit."""
    again: Any
    if saved.plain:
        config: Any = text_config(model)
        attention = config._attn_implementation
        again = AutoModelForCausalLM.from_pretrained(
            saved.path, dtype=model.dtype, attn_implementation=attention
        )
        again.to(model.device)
    else:
        again, _ = load(saved.path, device=str(model.device), dtype=str(model.dtype)[6:])  # pyright: ignore[reportArgumentType]
    if window(again) != window(model):
        return float("inf")
    return difference(probe(model), probe(again))


def probe(model: Any) -> torch.Tensor:
    """Logits [2, tokens, vocab], float32, at the first positions and at some all over the window.

    Without the latter, settings that act further out only would go unseen. Where positions must not
    skip, they are the window's last.
    """
    config: Any = text_config(model)
    ids = torch.arange(_PROBE, device=model.device)[None] * 7 % int(config.vocab_size)
    near = torch.arange(_PROBE, device=model.device)[None]
    last = (window(model) or _PROBE) - 1
    far = torch.linspace(0, last, _PROBE, device=model.device).long()[None]
    if needs_consecutive_positions(model):
        far = last - _PROBE + 1 + near
    call: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = [
            model(input_ids=ids, position_ids=places, **call).logits.float()
            for places in (near, far)
        ]
    model.train(training)
    return torch.cat(logits)


def difference(here: torch.Tensor, there: torch.Tensor) -> float:
    """Largest difference of logits, relative to the largest of them."""
    return float((here - there).abs().max() / here.abs().max())


def model_card(
    model: PreTrainedModel, saved: Saved, record: Mapping[str, Any], done: Mapping[str, Any]
) -> str:
    """The README of a checkpoint: what it was made from, and how it measured."""
    methods = " + ".join(f"`{method}`" for method in methods_of(model))
    source = str(record["model"])
    source = Path(source).name if Path(source).is_dir() else source
    lines = [
        f"# {source}, read further",
        "",
        f"Made by longctx from `{source}`: {methods or 'no change of positions'}, a window of "
        f"{window(model):,} tokens, fine-tuned for {done['updates']:,} updates on "
        f"{done['tokens']:,} tokens.",
        "",
        _loading(saved),
        "",
    ]
    if done["stopped"]:
        lines += [f"Beyond what was allowed: {done['stopped']}.", ""]
    if done["rounded"] > 1e-4:
        lines += [
            f"The adapters were merged into weights in {str(model.dtype)[6:]}, whose rounding "
            f"moved logits by {done['rounded']:.1%} of the largest. The figures are of the model "
            "with the adapters beside it, as they lie in the run's folder.",
            "",
        ]
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
