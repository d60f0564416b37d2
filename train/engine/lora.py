"""LoRA and LongLoRA by peft: put adapters on a model, save, load and merge them.

    model = add_lora(model, Lora(r=16, embeddings=True, norms=True))    # LongLoRA
    …                                                                      # train
    save_adapter(model, "adapter/")
    model = load_adapter(longctx.load("base")[0], "adapter/")              # the method comes along
    longctx.save(merged(model), tokenizer, "out/")                         # plain again

Training adapters alone leaves the model short of what full training reaches on long texts; LongLoRA
(Chen et al. 2023, arXiv:2309.12307, section 3.3) closes most of the gap by training embeddings and
norms whole beside them. Both are kept in the adapter's folder, and weights that the model ties stay
tied in every step. The folder holds the model's config too, whose rotary settings and `longctx`
record a server needs: a bare adapter on the unextended base is silently another model.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from longctx.core import extend
from longctx.errors import ModelError, RunError, nearest
from longctx.folders import new_folder
from longctx.model import attention_modules, text_config
from longctx.patch import Method
from longctx.registry import make_method

from ..memory.model_spec import norm_layers

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Lora", "add_lora", "load_adapter", "merged", "save_adapter"]

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_CARD = "# LoRA adapters of {}\n\nFor the base as `config.json` extends it: `load_adapter` does.\n"
_SETTINGS = ("max_position_embeddings", "rope_parameters")


@dataclass(frozen=True, slots=True)
class Lora:
    """Which weights are trained, and how."""

    r: int = 16
    """Rank of the update of each adapted layer."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that are adapted, wherever they occur; none for those of the
    attention, whatever the model calls them."""
    embeddings: bool = False
    """Train the token embeddings whole (LongLoRA), and with them a head tied to them."""
    norms: bool = False
    """Train all norms whole (LongLoRA)."""

    def __post_init__(self) -> None:
        if type(self.r) is not int or self.r < 1:
            raise RunError(f"r={self.r!r}: expected a whole number, 1 or more.")
        if not 0 < self.alpha < float("inf"):
            raise RunError(f"alpha={self.alpha!r}: expected a number above 0, often 2·r.")
        if isinstance(self.target_modules, str):
            raise RunError(
                f"target_modules={self.target_modules!r}: expected names of linear layers, as in "
                "('q_proj', 'v_proj')."
            )

    def target_modules_in(self, model: PreTrainedModel) -> list[str]:
        """The names that were asked for, if there are such layers, else those of the attention.

        Raises:
            RunError: no such layer below the head.
        """
        if not self.target_modules:
            blocks = [module for _, module, _ in attention_modules(model)]
            parts = (part for block in blocks for part in block.named_modules())
            return sorted({name for name, part in parts if isinstance(part, nn.Linear)})
        head: Any = model.get_output_embeddings()
        linear = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        absent = [name for name in self.target_modules if name not in linear]
        if absent:
            raise RunError(
                f"target_modules={self.target_modules!r}: model type {model.config.model_type!r} "
                f"has no linear layer {', '.join(map(repr, absent))} below its "
                f"head{nearest(absent[0], linear)} (it has {', '.join(sorted(linear))})."
            )
        return list(self.target_modules)


def add_lora(model: PreTrainedModel, lora: Lora, *, seed: int = 0) -> PeftModel:
    """Put adapters on `model`, in place; nothing else of it is trained from now on.

    Args:
        model: patched or not; put the method on first.
        lora: what is trained.
        seed: chooses the adapters' first weights. The model's logits are the same before training.

    Returns:
        A PEFT model around `model`, which `get_base_model()` gives back.

    Raises:
        ModelError: adapters in place already, or embeddings that peft cannot keep tied.
        RunError: a target that the model does not have, or no peft.
    """
    peft = _peft()
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"{type(model).__name__} has adapters already: merge them first (merged(model)), or "
            "load the base anew."
        )
    targets = lora.target_modules_in(model)
    tied = lora.embeddings and _tied(model)
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=targets,
        modules_to_save=_whole(model, lora, tied) or None,
        ensure_weight_tying=tied,
        task_type="CAUSAL_LM",
    )
    # peft draws on the CPU, whatever the device
    with _without_deprecations(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return peft.get_peft_model(model, config)


def merged(model: PeftModel) -> PreTrainedModel:
    """Add the adapters to the weights: the plain model inside, patch kept, tied weights tied.

    The adapters are used up: `model` is not a PEFT model any more. All weights can be trained
    again.
    """
    causal: Any = model.get_base_model()
    head = causal.get_output_embeddings()
    plain: Any = model.merge_and_unload()
    # peft puts a new layer in the place of a tied head, with its sizes swapped.
    plain.set_output_embeddings(getattr(head, "original_module", head))
    plain.tie_weights()
    return plain.requires_grad_(True)


def save_adapter(
    model: PeftModel, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write the adapters, all that is trained whole, and the config that they belong to.

    Plain peft and vLLM read the folder. The base has to be extended there as it was here: plainly
    by the `config.json` in it (vLLM: `--hf-config-path`), or by `load_adapter`.

    Args:
        model: from `add_lora` or `load_adapter`.
        folder: does not exist yet, or is empty.
        overwrite: replace what is there, once the new adapter is complete.

    Raises:
        RunError: the folder is taken, or cannot be written.
    """
    causal: Any = model.get_base_model()
    with new_folder(Path(folder), overwrite=overwrite) as staging:
        # What is trained whole is saved in any case; "auto" would ask the hub about the rest.
        model.save_pretrained(str(staging), save_embedding_layers=False)
        causal.config.save_pretrained(staging)
        (staging / "README.md").write_text(_CARD.format(Path(causal.name_or_path).name))


def load_adapter(base_model: PreTrainedModel, folder: str | os.PathLike[str]) -> PeftModel:
    """Put saved adapters on the base that they were trained on, in place.

    Args:
        base_model: the base, extended as it was in training or not at all: then the method that
            the folder records is put on it.
        folder: from `save_adapter`; of other adapters, which record no method, the base is taken
            as it is.

    Returns:
        A PEFT model in eval mode, whose adapters can be trained further.

    Raises:
        ModelError: nothing there, another base, or a base under another method. After a failure
            half-way the base is to be loaded anew.
        RunError: no peft.
    """
    peft, path = _peft(), Path(folder)
    missing = [name for name in _FILES if not (path / name).is_file()]
    if missing:
        raise ModelError(
            f"{path} holds no {' and no '.join(missing)}: expected a folder from save_adapter."
        )
    if hasattr(base_model, "peft_config"):
        raise ModelError(f"{type(base_model).__name__} has adapters already: load the base anew.")
    if (path / "config.json").is_file():
        _extend_as_recorded(base_model, path)
    try:
        with _without_deprecations():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = peft.PeftModel.from_pretrained(
                base_model, str(path), is_trainable=True, torch_device=str(base_model.device)
            )
    except (RuntimeError, ValueError, KeyError, UserWarning, SafetensorError) as error:
        raise ModelError(
            f"the adapters in {path} do not fit {type(base_model).__name__} ({error}): load the "
            "base that they were trained on."
        ) from error
    return model.eval()


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise RunError(
            "adapters are peft's: pip install 'longctx-toolkit[train]', or train all weights."
        ) from error
    return peft


@contextmanager
def _without_deprecations() -> Generator[None]:
    """Keep to ourselves what peft 0.21 asks of transformers 5.23 by an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def _tied(model: PreTrainedModel) -> bool:
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def _whole(model: PreTrainedModel, lora: Lora, tied: bool) -> list[str]:
    """Full names of the modules that are trained whole."""
    embeddings = model.get_input_embeddings()
    names: list[str] = []
    for name, module in model.named_modules():
        if lora.embeddings and module is embeddings:
            if tied and name.rpartition(".")[2] != "embed_tokens":
                raise ModelError(
                    f"the embeddings of model type {model.config.model_type!r} are tied to its "
                    f"head and called {name!r}, and peft keeps none tied but 'embed_tokens': pass "
                    "embeddings=False."
                )
            names.append(name)
    return [*names, *(name for name, _ in norm_layers(model) if lora.norms)]


def _extend_as_recorded(model: PreTrainedModel, folder: Path) -> None:
    """Put on `model` the methods that `folder` records, or see that it is under the same."""
    config: Any = model.config
    saved: Any = type(config).from_pretrained(folder)
    record, own = (getattr(c, "longctx", None) for c in (saved, config))
    if own is not None and not _same(own, record):
        raise ModelError(
            f"the adapters in {folder} were trained under {_names(record)}, the model is under "
            f"{_names(own)}: pass the base without a method (longctx.patch_of(model).remove()); "
            "the recorded one is put on it."
        )
    missing: Any = record if own is None else None
    text = text_config(model)
    wanted = missing["original"] if missing else _values(saved.get_text_config(decoder=True))
    if not _same(_values(text), wanted):
        raise ModelError(
            f"the adapters in {folder} were trained on a model with {wanted}, this one has "
            f"{_values(text)}: load the base that they were trained on."
        )
    for method in _methods(missing):
        extend(model, method, replace=True)


def _values(config: Any) -> dict[str, Any]:
    return {key: getattr(config, key, None) for key in _SETTINGS}


def _methods(record: dict[str, Any] | None) -> list[Method]:
    return [
        make_method(entry["name"], {key: value for key, value in entry.items() if key != "name"})
        for entry in (record["methods"] if record else [])
    ]


def _names(record: dict[str, Any] | None) -> str:
    return " and ".join(map(str, _methods(record))) or "no method"


def _same(one: Any, other: Any) -> bool:
    """Whether both are the same JSON: a tuple comes back as a list."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
