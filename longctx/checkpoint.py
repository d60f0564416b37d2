"""Checkpoints in and out: hub ids, folders, GGUF files and the embedded model; patches kept."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from .config_windows import TEXT_PARTS, doubtful, impossible, text_part
from .conversion import recorded
from .errors import ModelError, RunError
from .folders import left_over, new_folder
from .gguf import convert_gguf
from .model import text_config, unwrapped
from .patch import methods_of
from .quiet import without_messages
from .record import refuse_unrestored, restore
from .remote_code import load_config, remote_twin, write_remote_code
from .restoring import restore_conversion, without_report
from .serving.engines import Reading, checkpoint_of, readings
from .twin import build_twin, differences
from .weights import (
    read_config,
    refuse_adapter,
    refuse_foreign_weights,
    refuse_incomplete,
    small_vocabulary,
)

__all__ = ["Saved", "load", "load_tokenizer", "local_folder", "locate", "save"]

_log = logging.getLogger(__name__)
EMBEDDED = ("demo", "demo-tuned")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]


@dataclass(frozen=True, slots=True)
class Saved:
    """What `save` wrote and who can read it."""

    path: Path
    plain: bool
    """Whether plain transformers loads it to the same logits."""
    message: str
    """The same in a sentence."""
    engines: tuple[Reading, ...] = ()
    """What each engine does with it, by the table that `longctx.serving.engines` keeps."""

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {reading}" for reading in self.engines)])


def load(
    source: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: Dtype = "auto",
    attn: Attention = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, with the patch that it was saved with in place.

    Args:
        source: a checkpoint folder, a hub id, a GGUF file (or a folder with one), "demo" for the
            embedded model, or "demo-tuned" for the same after fine-tuning to 2,048 tokens.
        device: "auto" spreads over the GPUs there are, else CPU; or a torch device.
        dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
        attn: "auto" is flash-attn on a GPU where it is installed, else SDPA, or eager in families
            that have neither (Gemma-2, GPT-OSS, BLOOM, …).
        trust_remote_code: run Python that the checkpoint brings along. Off unless you say so.

    Returns:
        The model in eval mode, and its tokenizer. `longctx.patch_of(model)` is the restored patch.

    Raises:
        ModelError: nothing there, a corrupt file, weights that are not safetensors inside the
            folder or not all of the model's, an adapter, or code in the checkpoint.
    """
    path = _converted(source)
    taken = (
        "" if isinstance(path, Path) else " (no folder here, so taken for a hub id: check the name)"
    )
    try:
        if isinstance(path, str):
            cached_file(path, "config.json")  # where no hub answers, wait for it once
        refuse_foreign_weights(path)
        for doubt in _claims(path):
            _log.warning("%s: %s.", source, doubt)
    except (ModelError, OSError, ValueError) as error:
        raise ModelError(f"cannot load {str(source)!r}{taken}: {error}") from error
    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    placed = {"device_map": "auto" if device == "auto" else device} if on_gpu else {}
    try:
        config = load_config(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(
            path, config=config, trust_remote_code=trust_remote_code
        )
        # Whatever attention the config itself names.
        config._attn_implementation = _attention(attn, config, on_gpu)  # pyright: ignore[reportPrivateUsage]
        with without_report(config):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # named below
                output_loading_info=True,
                **placed,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AssertionError) as error:
        raise ModelError(f"cannot load {str(source)!r}{taken}: {error}") from error
    except Exception as error:  # safetensors and tokenizers raise bare Exception subclasses
        raise ModelError(
            f"cannot load {str(source)!r}, a file of it is corrupt or incomplete "
            f"({type(error).__name__}: {error}); fetch or convert it again."
        ) from error
    model: PreTrainedModel = loaded[0]
    own = restore_conversion(model, path, loaded[1]["unexpected_keys"])
    unexpected = set(loaded[1]["unexpected_keys"]) - own
    refuse_incomplete(source, model, {**loaded[1], "unexpected_keys": unexpected})
    implementation: Any = model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
    if attn == "auto" and implementation == "eager":
        _log.warning(
            "%s: model type %r has no SDPA, so its attention is computed by 'eager'.",
            source,
            model.config.model_type,
        )
    if wrong := small_vocabulary(model, tokenizer):
        _log.warning("%s: %s.", source, wrong)
    if not on_gpu and device not in ("auto", "cpu"):
        try:
            model.to(torch.device(device))  # pyright: ignore[reportArgumentType]
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"cannot put a model on device {device!r}: {error}") from error
    model.eval()
    if isinstance(path, Path):
        _refuse_contradiction(path / "config.json")
    restore(model)
    return model, tokenizer


def load_tokenizer(
    source: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone, from anything that `load` takes.

    Raises:
        ModelError: nothing there, or no tokenizer in it.
    """
    path = _converted(source)
    try:
        return AutoTokenizer.from_pretrained(
            path,
            config=load_config(path, trust_remote_code=trust_remote_code),
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # tokenizers raises bare Exceptions on a damaged file
        raise ModelError(f"cannot load the tokenizer of {str(source)!r}: {error}") from error


def _converted(source: str | os.PathLike[str]) -> str | Path:
    """A folder or a hub id; a GGUF file is converted first."""
    path = locate(source)
    is_gguf = isinstance(path, Path) and path.suffix == ".gguf"
    return convert_gguf(path) if is_gguf else path  # pyright: ignore[reportArgumentType]


def _claims(path: str | Path) -> list[str]:
    """What a config.json says that software reads in different ways, and how it is read here.

    Raises:
        ModelError: a window, factor or base in it cannot be.
    """
    config = read_config(path)
    for key, what, expected in impossible(text_part(config)):
        raise ModelError(f"config.json: {key}: {what}: expected {expected}. Mend it.")
    return [f"config.json: {key}: {what}" for key, what, _ in doubtful(config)]


def _attention(attn: Attention, config: PreTrainedConfig, on_gpu: bool) -> str | None:
    """What to ask transformers for; None is SDPA, or eager in families that have no SDPA."""
    if attn != "auto":
        return attn
    kinds: Any = AutoModelForCausalLM._model_mapping  # pyright: ignore[reportPrivateUsage]
    known = type(config) in kinds
    if on_gpu and (not known or getattr(kinds[type(config)], "_supports_flash_attn", False)):
        try:
            metadata.version("flash-attn")
        except metadata.PackageNotFoundError:
            return None
        return "flash_attention_2"
    return None


def local_folder(source: str) -> Path:
    """The folder of a local checkpoint.

    Raises:
        ModelError: it does not exist, or it is a hub id or a GGUF file.
    """
    path = locate(source)
    if isinstance(path, Path) and path.is_dir():
        return path
    raise ModelError(f"{source!r} is not a local checkpoint folder: `longctx convert` makes one.")


def locate(source: str | os.PathLike[str]) -> str | Path:
    """A path that exists, or the hub id as it was given.

    Raises:
        ModelError: a path with nothing there, or a folder without a checkpoint.
    """
    if not isinstance(source, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelError(f"source={source!r}: expected a folder, a GGUF file or a hub id.")
    if source in EMBEDDED:
        return Path(__file__).parent / str(source)
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1 and not any(path.glob("*.safetensors*")):
            return files[0]
        if not (path / "config.json").exists():
            refuse_adapter(path)
            raise ModelError(
                f"{path} holds no config.json and {len(files)} GGUF files: expected a checkpoint "
                "folder or exactly one GGUF; name the file."
            )
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is not a GGUF file: pass the checkpoint's folder.")
        return path
    looks_local = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1
    if looks_local or path.suffix == ".gguf" or path.is_symlink():
        raise ModelError(
            f"{source} does not exist: expected a folder, a GGUF file or a hub id.{_left(path)}"
        )
    return str(source)


def _left(path: Path) -> str:
    """What a killed process left in a checkpoint's stead, as a sentence."""
    try:
        found = left_over(path)
    except OSError:
        return ""
    if not found:
        return ""
    return f" A run was killed while it wrote there: {', '.join(map(str, found))} may be whole."


def save(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    remote_code: bool = False,
) -> Saved:
    """Write a self-describing checkpoint, in transformers' own terms where it has them.

    Args:
        model: extended or not; `torch.compile` and data-parallel wrappers are looked through.
        tokenizer: saved beside it, with `model_max_length` raised to the window where it was the
            original window.
        out: a folder that does not exist yet, or is empty.
        overwrite: replace what is there, once the new checkpoint is complete.
        remote_code: write a module of a few lines beside it, by which transformers loads it with
            the methods in place where longctx is installed: `AutoModelForCausalLM.from_pretrained(
            out, trust_remote_code=True)`, and with it lm-eval, trl and `transformers serve`.
            Without trust_remote_code it is refused. For methods that no config can say.

    Returns:
        Where it is and whether plain transformers loads it to identical logits: what the written
        config (with remote_code, the module) describes was built without weights and compared with
        the model, buffer by buffer. Where it cannot, a UserWarning says so too.

    Raises:
        RunError: the folder is taken, is or holds what the model was loaded from, holds files that
            no checkpoint has, or cannot be written.
        ModelError: adapters that are not merged; recorded methods that are not in place, or a
            damaged record; remote_code for a model without a method, or of a
            class that is not transformers' own.
    """
    model = unwrapped(model)
    _refuse_adapters(model)
    if not hasattr(tokenizer, "save_pretrained"):
        raise ModelError(
            f"expected the model's tokenizer, got {type(tokenizer).__name__}: longctx.load gives "
            "both."
        )
    if not isinstance(out, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RunError(f"out={out!r}: expected the path of a folder.")
    refuse_unrestored(model)
    made_by = recorded(model)
    beyond = [method.name for method in methods_of(model) if not method.plain_loadable]
    beyond += [] if made_by is None else [made_by]
    if remote_code and made_by is not None:
        raise ModelError(
            f"remote_code restores methods that extend puts on, and this model was made by "
            f"{made_by}: save it without, and load it by longctx.load."
        )
    inputs = [name for name in (model.name_or_path, tokenizer.name_or_path) if name]
    with new_folder(Path(out), overwrite=overwrite, inputs=inputs) as folder:
        _write(model, tokenizer, folder)
        if remote_code:
            write_remote_code(folder, model)
        elif beyond:
            _name_architecture(folder / "config.json", beyond)
        otherwise = [] if beyond and not remote_code else _differences(model, folder, remote_code)
    read = readings(checkpoint_of(read_config(Path(out))))
    if otherwise:
        message = (
            f"{out} is not known to load to this model's logits: compared with what its config "
            f"describes, {'; '.join(otherwise[:3])}{' and more' if otherwise[3:] else ''}."
        )
        warnings.warn(message, stacklevel=2)
        return Saved(Path(out), False, message)
    if remote_code:
        message = (
            f"{out} loads with trust_remote_code=True to the same logits where longctx is "
            "installed (pip install longctx-toolkit). Without trust_remote_code transformers "
            "refuses it."
        )
        return Saved(Path(out), False, message, read)
    if not beyond:
        message = f"{out} loads in plain transformers to the same logits."
        return Saved(Path(out), True, message, read)
    message = (
        f"{out}: {' and '.join(beyond)} cannot be said in a transformers config. longctx.load "
        f"restores it; plain transformers, mlx-lm and ctranslate2 would load {_otherwise(made_by)}"
        f", and engines that go by the architecture's name refuse it."
        f"{'' if made_by else _WITH_CODE}"
    )
    warnings.warn(message, stacklevel=2)
    return Saved(Path(out), False, message, read)


_WITH_CODE = " remote_code=True (--remote-code) lets transformers restore it too."


def _otherwise(made_by: str | None) -> str:
    """What software reads that does not know the record."""
    if made_by is None:
        return "the unextended model"
    return "these weights under ordinary attention, for which they were not made"


def _refuse_adapters(model: PreTrainedModel) -> None:
    """Adapters that wrap layers: what would be written is neither the model nor the adapter."""
    if any("base_layer" in module._modules for module in model.modules()):  # pyright: ignore[reportPrivateUsage]
        raise ModelError(
            "the model has adapters (PEFT) on it: merge them first (model.merge_and_unload() gives "
            "the model to save), or write the adapter alone (model.save_pretrained)."
        )


def _differences(model: PreTrainedModel, folder: Path, remote_code: bool) -> list[str]:
    """What transformers would build otherwise from what was written."""
    try:
        if remote_code:
            twin = remote_twin(folder, model)
        else:
            twin = build_twin(model, type(model.config).from_pretrained(folder))
        found = differences(model, twin)
    except (ModelError, OSError, ValueError) as error:
        return [f"nothing could be compared ({error})"]
    if all(method.length_invariant for method in methods_of(model)):
        return found
    return [words for words in found if "inv_freq" not in words]  # those of the last request


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    config = text_config(model)
    length = int(getattr(config, "max_position_embeddings", 0))
    declared = tokenizer.model_max_length
    record: dict[str, Any] | None = getattr(model.config, "longctx", None)
    if record and declared == record["original"]["max_position_embeddings"]:
        tokenizer.model_max_length = length  # else the tokenizer would truncate at the old window
    doubts = ["long_mscale"]  # vLLM's keys
    if methods_of(model):
        doubts.append("does not match the ratio")  # methods above yarn may read further than it
    try:
        tokenizer.save_pretrained(folder)
        with without_messages("transformers.modeling_rope_utils", *doubts):
            model.save_pretrained(folder)
    finally:
        tokenizer.model_max_length = declared
    _add_legacy_keys(folder / "config.json")


def _add_legacy_keys(path: Path) -> None:
    """Say the rotary settings in the keys of transformers 4 too, which other software reads.

    A base of its own is always said: software that finds none falls back to 10,000. Settings per
    layer type have no other form.
    """
    config: dict[str, Any] = json.loads(path.read_text())
    text = next((config[key] for key in TEXT_PARTS if isinstance(config.get(key), dict)), config)
    entry: dict[str, Any] = text.get("rope_parameters") or {}
    nested: Any = entry.get("full_attention")
    base = (nested if isinstance(nested, dict) else entry).get("rope_theta")
    if base is None:
        return
    text["rope_theta"] = base
    if "rope_theta" in entry and entry.get("rope_type", "default") != "default":
        text["rope_scaling"] = entry
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _name_architecture(path: Path, methods: Sequence[str]) -> None:
    """Name a class that engines do not know, since they would load the one without the methods.

    Engines go by this name (vLLM, SGLang, llama.cpp's converter); transformers' Auto classes,
    mlx-lm and ctranslate2 go by the model type.
    """
    config: dict[str, Any] = json.loads(path.read_text())
    words = [word.title() for name in methods for word in name.split("_")]
    config["architectures"] = [f"Longctx{''.join(words)}{name}" for name in config["architectures"]]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _refuse_contradiction(path: Path) -> None:
    """A config whose rotary settings were edited in one of the two places that say them."""
    config: dict[str, Any] = json.loads(path.read_text())
    legacy, present = config.get("rope_scaling"), config.get("rope_parameters")
    if legacy and present and legacy != present:
        raise ModelError(
            f"{path}: rope_parameters says {present} and rope_scaling {legacy}, of which "
            "transformers takes the latter: it was edited after saving. Make them say the same, or "
            "extend the original anew (longctx.extend)."
        )
