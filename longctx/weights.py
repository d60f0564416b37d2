"""Which files a model's weights come from, and whether they are all that the model has.

Weights are read from safetensors inside the checkpoint's folder. A folder of the hub's cache holds
links to the blobs beside it, which count as inside.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from huggingface_hub.constants import HF_HUB_CACHE
from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from .errors import ModelError
from .schema import conform

__all__ = [
    "ADAPTER",
    "INDEX",
    "WEIGHTS",
    "read_config",
    "read_tensors",
    "refuse_adapter",
    "refuse_foreign_weights",
    "refuse_incomplete",
    "refuse_small_vocabulary",
    "small_vocabulary",
]

ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
_AGAIN = "Fetch or convert the checkpoint again."
_SHOWN = 3  # names in a message
_TOWER = re.compile(r"vision|visual|audio|speech|image|video|multi_?modal|mm_|talker|token2wav")
"""Parts of a multimodal checkpoint that its text model has not."""


class _Index(Struct):
    """Which file each tensor lies in."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]


class _Config(Struct):
    """As much of a config.json as names files."""

    transformers_weights: str | None = None


def refuse_adapter(source: str | Path) -> None:
    """Refuse a checkpoint with an adapter in it, which transformers would put on unasked.

    Args:
        source: a folder, or a hub id.

    Raises:
        ModelError: it holds one.
    """
    if _file(source, ADAPTER) is not None:
        raise ModelError(
            f"{source} holds an adapter ({ADAPTER}): expected whole weights. Merge it with peft "
            "(AutoPeftModelForCausalLM.from_pretrained, merge_and_unload, save_pretrained), or "
            "move the adapter's files out of it to have the base model alone."
        )


def refuse_foreign_weights(source: str | Path) -> None:
    """Refuse an adapter, and weights that are not safetensors inside the folder: before reading.

    Args:
        source: a folder, or a hub id.

    Raises:
        ModelError: there is an adapter, the index or config.json names another kind of file or
            one elsewhere, a link leaves the folder, or a file is missing or damaged.
    """
    refuse_adapter(source)
    where = f"{source}/config.json"
    stored = conform(read_config(source), _Config, where, next_step=_AGAIN, error=ModelError)
    named = stored.transformers_weights or WEIGHTS
    _refuse_name(named, where)
    if named == WEIGHTS and _file(source, WEIGHTS) is None and _file(source, INDEX) is not None:
        named = INDEX
    names = [named]
    if named.endswith(".index.json"):
        index = _file(source, named)
        if index is None:
            raise ModelError(f"{source} holds no file {named}. {_AGAIN}")
        names = _shards(index)
    if isinstance(source, Path):
        for name in names:
            _refuse_file(source, name)


def _shards(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        ModelError: the index is damaged, or one is not safetensors inside the folder.
    """
    stored = conform(_read(index), _Index, index, next_step=_AGAIN, error=ModelError)
    names = sorted(set(stored.weight_map.values()))
    for name in names:
        _refuse_name(name, index)
        if not name.endswith(".safetensors"):
            raise _foreign(name, index)
    return names


def _refuse_name(name: str, where: Path | str) -> None:
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name
    if not inside or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise _foreign(name, where)


def _foreign(name: str, where: Path | str) -> ModelError:
    return ModelError(
        f"{where} names {name!r}: weights are read from *.safetensors inside the checkpoint's "
        "folder alone, since other files may execute code when read. Ask the author for "
        "safetensors, or convert where it is safe."
    )


def _refuse_file(folder: Path, name: str) -> None:
    path = folder / name
    if not path.is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        there = f" ({pickled[0]} is a pickle, which executes code when read)" if pickled else ""
        raise ModelError(f"{folder} holds no file {name}{there}. {_AGAIN}")
    target = path.resolve()
    if not _is_inside(target, folder.resolve()):
        raise ModelError(
            f"{path} is a link to {target}, outside the checkpoint's folder: weights are read from "
            "inside it alone. Copy the file, or load the folder that it lies in."
        )
    try:
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{path} is corrupt, incomplete or not safetensors ({error}). {_AGAIN}"
        ) from error


def _is_inside(target: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, or in the blobs that a folder of the hub's cache links."""
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    if target.parent.name == "blobs":
        homes.append(Path(HF_HUB_CACHE).resolve())
    return any(target.is_relative_to(home) for home in homes)


def _file(source: str | Path, name: str) -> Path | None:
    """A file of a checkpoint, None where it has none (or the hub cannot be reached)."""
    if isinstance(source, Path):
        path = source / name
        return path if os.path.lexists(path) else None
    try:
        found = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # what is wrong with the id is said when it is loaded
        return None
    return None if found is None else Path(found)


def read_config(source: str | Path) -> dict[str, Any]:
    """The config.json of a folder or hub id as it is, empty where there is none.

    Raises:
        ModelError: it is not a JSON object.
    """
    path = _file(source, "config.json")
    value = {} if path is None else _read(path)
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {str(value)[:40]!r}, no JSON object. {_AGAIN}")
    return value


def _read(path: Path) -> Any:
    """JSON of a checkpoint, which may hold Infinity (Mamba-2's configs do)."""
    try:
        if not path.is_file():
            raise ModelError(f"{path} is not a regular file. {_AGAIN}")
        return json.loads(path.read_bytes())
    except ModelError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: expected JSON that can be read ({error}). {_AGAIN}") from error


def refuse_incomplete(source: object, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse weights that were not all of the model's, or more: the rest would be random.

    Tied weights, and what transformers itself passes over for the model type, do not count; nor do
    stored copies of buffers that are computed, and a multimodal checkpoint's other towers.

    Args:
        source: for the message.
        model: as it was loaded.
        info: transformers' account of the loading (`output_loading_info=True`).

    Raises:
        ModelError: it names the tensors.
    """
    buffers = {name for name, _ in model.named_buffers()}
    unexpected = [
        name
        for name in sorted(info["unexpected_keys"])
        if name not in buffers
        and not name.endswith("rotary_emb.inv_freq")
        and not _TOWER.search(name)
    ]
    mismatched = [
        f"{name} (is {list(there)}, config.json says {list(said)})"
        for name, there, said in sorted(info["mismatched_keys"])
    ]
    wrong = [
        f"{len(names)} {what}: {_some(names)}"
        for names, what in (
            (sorted(info["missing_keys"]), "missing"),
            (unexpected, "unknown to the model"),
            (mismatched, "of another shape"),
            (sorted(map(str, info.get("error_msgs") or ())), "unreadable"),
        )
        if names
    ]
    if wrong:
        raise ModelError(
            f"{source}: the weights are not those that config.json describes. Tensors "
            f"{'; '.join(wrong)}. Nothing is filled in: fetch or convert the checkpoint again, or "
            "mend config.json."
        )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, …"


def read_tensors(source: str | Path, names: Collection[str]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint, on the CPU.

    Args:
        source: a folder or a hub id.
        names: of the tensors; those that there are not are left out.

    Raises:
        ModelError: a file that cannot be read.
    """
    index = _file(source, INDEX)
    places: dict[str, str] = {}
    if index is not None:
        places = conform(_read(index), _Index, index, next_step=_AGAIN, error=ModelError).weight_map
    found: dict[str, Tensor] = {}
    for file in sorted({places.get(name, WEIGHTS) for name in names}):
        path = _file(source, file)
        if path is None:
            continue
        try:
            with safe_open(path, framework="pt") as opened:
                there = set(opened.keys())
                found |= {name: opened.get_tensor(name) for name in names if name in there}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read ({error}). {_AGAIN}") from error
    return found


def small_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a tokenizer gives ids that the model has no embedding for, None if it does not."""
    embeddings: Any = model.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", None)
    tokens = tokenizer.get_vocab()
    if size is None or not tokens:
        return None
    beyond = sorted((number, token) for token, number in tokens.items() if number >= size)
    if not beyond:
        return None
    number, token = beyond[0]
    return (
        f"the tokenizer has ids up to {beyond[-1][0]:,} and the model {size:,} embeddings: "
        f"{len(beyond):,} tokens, from {token!r} ({number:,}) on, cannot be read"
    )


def refuse_small_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for, before any is looked up.

    Raises:
        ModelError: it says how many, and from which on.
    """
    if wrong := small_vocabulary(model, tokenizer):
        raise ModelError(
            f"{wrong}. Take the tokenizer that the model was trained with, or make room "
            "(model.resize_token_embeddings) and train the new rows."
        )
