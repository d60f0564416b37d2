"""A checkpoint as a GGUF file that llama.cpp computes to the same numbers, read back and compared.

    export_gguf(model, tokenizer, "out.gguf", dtype="f16")

llama.cpp's own converter carries some methods and drops others without a word. This writes the
frequencies themselves, whatever method they come from (`gguf_layout`), and refuses by name what
llama.cpp cannot compute. Norms, biases and frequencies stay float32 in every dtype.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..conversion import recorded
from ..errors import ModelError, RunError
from ..files import write_whole
from ..model import text_config, unwrapped
from ..patch import patch_of
from .gguf_layout import Layout, layout_of, tensors_of
from .gguf_tokenizer import Vocabulary, vocabulary_of

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

__all__ = ["Exported", "GgufDtype", "export_gguf"]

GgufDtype = Literal["f32", "f16", "q8_0"]
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
_Q8_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and what was found when it was read back."""

    path: Path
    architecture: str
    """`general.architecture` of llama.cpp."""
    window: int
    """`context_length` in tokens, the extended one."""
    tensors: int
    bytes: int
    off: float
    """Largest difference of a weight in the file from the model's, relative to the largest of its
    tensor: 0 in f32, rounding in the others."""
    vocabulary: str
    """How llama.cpp splits text."""
    notes: tuple[str, ...]
    """What it does otherwise with some texts."""

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.tensors} tensors, {self.bytes / 2**20:.1f} MiB, window "
            f"{self.window} tokens, as architecture {self.architecture!r} of llama.cpp",
            f"  read back: metadata equal, weights within {self.off:.1e} of the largest in each "
            "tensor",
            f"  tokenizer: {self.vocabulary}",
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def export_gguf(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    out: str | os.PathLike[str],
    *,
    dtype: GgufDtype = "f32",
) -> Exported:
    """Write a model as GGUF, extended as it is, and compare the file with it.

    Args:
        model: of longctx.load, with its patches in place; float32 weights give an exact file.
        tokenizer: its tokenizer.
        out: the file; one that is there is replaced once the new one is whole.
        dtype: of the weight matrices. q8_0 has blocks of 32 weights with a scale each.

    Raises:
        ModelError: llama.cpp cannot compute the model or split its text, weights do not fit the
            dtype, or the `gguf` package is missing.
        RunError: the file cannot be written, or does not hold what was written.
    """
    if dtype not in _FILE_TYPES:
        raise RunError(f"dtype={dtype!r}: expected {', '.join(_FILE_TYPES)}.")
    try:
        metadata.version("gguf")
    except metadata.PackageNotFoundError as error:
        raise ModelError(
            "writing GGUF needs the gguf package: pip install 'longctx-toolkit[gguf]'"
        ) from error
    causal, path = unwrapped(model), Path(out)
    made_by = recorded(causal)
    if made_by is not None:
        raise ModelError(
            f"llama.cpp computes no model made by {made_by}: serve it with `longctx serve`."
        )
    layout = layout_of(causal)
    embeddings: Any = causal.get_input_embeddings()
    vocabulary = vocabulary_of(tokenizer, int(embeddings.weight.shape[0]))
    keys = _keys(causal, layout, vocabulary, dtype)
    found: list[tuple[int, float]] = []

    def write(part: Path) -> None:
        _write(causal, layout, keys, dtype, part)
        found.append(_compare(causal, layout, keys, dtype, part))

    try:
        write_whole(path, write)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}. Make room, or name another file.") from error
    tensors, off = found[0]
    splits = f"{vocabulary.model}, cut as {vocabulary.pre!r}, {len(vocabulary.tokens):,} tokens"
    return Exported(
        path, layout.architecture, keys[f"{layout.architecture}.context_length"], tensors,
        path.stat().st_size, off, splits, vocabulary.notes,
    )  # fmt: skip


def _keys(
    model: PreTrainedModel, layout: Layout, vocabulary: Vocabulary, dtype: GgufDtype
) -> dict[str, Any]:
    """All metadata of the file by its full key."""
    config = text_config(model)
    arch, patch = layout.architecture, patch_of(model)
    head = int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    window = int(config.max_position_embeddings) if patch is None else patch.window
    keys: dict[str, Any] = {
        "general.name": Path(model.name_or_path or "").name or str(config.model_type),
        "general.file_type": _FILE_TYPES[dtype],
        f"{arch}.vocab_size": len(vocabulary.tokens),
        f"{arch}.context_length": window,
        f"{arch}.embedding_length": int(config.hidden_size),
        f"{arch}.block_count": int(config.num_hidden_layers),
        f"{arch}.feed_forward_length": int(config.intermediate_size),
        f"{arch}.attention.head_count": int(config.num_attention_heads),
        f"{arch}.attention.head_count_kv": int(config.num_key_value_heads),
        f"{arch}.attention.key_length": head,
        f"{arch}.attention.value_length": head,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        **{f"{arch}.rope.{name}": value for name, value in layout.rope.items()},
    }
    if layout.rope:
        keys[f"{arch}.rope.dimension_count"] = head
    if dtype == "q8_0":
        keys["general.quantization_version"] = 2
    record: Any = getattr(model.config, "longctx", None)
    if record is not None:  # how the model was extended, for whoever finds the file alone
        keys["longctx.record"] = json.dumps(record, sort_keys=True)
    return keys | _vocabulary_keys(vocabulary)


def _vocabulary_keys(vocabulary: Vocabulary) -> dict[str, Any]:
    known = {
        "model": vocabulary.model,
        "pre": vocabulary.pre,
        "tokens": vocabulary.tokens,
        "token_type": vocabulary.kinds,
        "merges": vocabulary.merges or None,
        "scores": vocabulary.scores or None,
        "add_bos_token": vocabulary.begins,
        "add_eos_token": vocabulary.ends,
        "add_space_prefix": vocabulary.space_prefix,
        **{f"{name}_token_id": index for name, index in vocabulary.special.items()},
    }
    keys = {f"tokenizer.ggml.{name}": value for name, value in known.items() if value is not None}
    if vocabulary.chat_template is not None:
        keys["tokenizer.chat_template"] = vocabulary.chat_template
    return keys


def _write(
    model: PreTrainedModel, layout: Layout, keys: dict[str, Any], dtype: GgufDtype, path: Path
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, layout.architecture)
    try:
        for key, value in keys.items():
            _adder(writer, value)(key, value)
        for name, tensor in tensors_of(model, layout):
            values, kind = _encoded(name, tensor, dtype)
            writer.add_tensor(name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _adder(writer: GGUFWriter, value: Any) -> Callable[[str, Any], None]:
    if isinstance(value, bool):
        return writer.add_bool
    if isinstance(value, int):
        return writer.add_uint32
    if isinstance(value, float):
        return writer.add_float32
    return writer.add_array if isinstance(value, list) else writer.add_string


def _kind(name: str, tensor: Tensor, dtype: GgufDtype) -> str:
    """The dtype of one tensor: vectors stay float32."""
    return dtype if tensor.ndim > 1 and name != "rope_freqs.weight" else "f32"


def _encoded(name: str, tensor: Tensor, dtype: GgufDtype) -> tuple[Any, Any]:
    """Values as they stand in the file, and their kind where numpy's dtype does not say it.

    Raises:
        ModelError: values that the dtype does not hold, or rows that are no whole blocks.
    """
    from gguf import GGMLQuantizationType, quants

    kind, values = _kind(name, tensor, dtype), tensor.contiguous().numpy()
    if kind == "f16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise ModelError(
                f"{name} has weights up to {np.abs(values).max():.3g}, beyond what f16 holds: "
                "export in f32 or q8_0."
            )
        return half, None
    if kind == "q8_0":
        if values.shape[-1] % _Q8_BLOCK:
            raise ModelError(
                f"{name} has rows of {values.shape[-1]} weights, and q8_0 blocks of {_Q8_BLOCK}: "
                "export in f16."
            )
        quantised = GGMLQuantizationType.Q8_0
        return quants.quantize(values, quantised), quantised
    return values, None


def _compare(
    model: PreTrainedModel, layout: Layout, keys: dict[str, Any], dtype: GgufDtype, path: Path
) -> tuple[int, float]:
    """Read the file back: the number of its tensors, and the largest relative difference.

    Raises:
        RunError: a key or a tensor is missing or another one.
    """
    from gguf import GGUFReader, quants

    reader = GGUFReader(path)
    for key, value in keys.items():
        there = _value(reader, key)
        if there != _stored(value):
            raise RunError(f"{path} was written, but holds {str(there)[:60]!r} as {key}.")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    limit, worst = {"f32": 0.0, "f16": 2.0**-11, "q8_0": 1 / 254 + 2.0**-11}[dtype], 0.0
    for name, tensor in tensors_of(model, layout):
        entry = stored.pop(name, None)
        if entry is None:
            raise RunError(f"{path} was written, but holds no tensor {name}.")
        values = torch.from_numpy(
            quants.dequantize(entry.data, entry.tensor_type).astype(np.float32)
        )
        if values.shape != tensor.shape:
            raise RunError(f"{path}: {name} has shape {[*values.shape]}, not {[*tensor.shape]}.")
        largest = float(tensor.abs().max()) or 1.0
        off = float((values - tensor).abs().max()) / largest
        if not off <= limit * 1.01:
            raise RunError(f"{path}: {name} is off by {off:.1e} of its largest weight.")
        worst = max(worst, off)
    if stored:
        raise RunError(f"{path} holds more than was written: {', '.join(sorted(stored)[:3])}.")
    return len(reader.tensors), worst


def _value(reader: GGUFReader, key: str) -> Any:
    entry = reader.get_field(key)
    return None if entry is None else entry.contents()


def _stored(value: Any) -> Any:
    """A value as the file holds it: numbers in float32; strings and integers as they are."""
    if isinstance(value, list):
        return [_stored(item) for item in value]
    return float(np.float32(value)) if isinstance(value, float) else value
