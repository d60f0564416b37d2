"""GGUF files as plain checkpoints, dequantised once."""

from __future__ import annotations

import hashlib
import os
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .errors import ModelError
from .folders import new_folder

__all__ = ["convert_gguf"]


def convert_gguf(path: Path) -> Path:
    """Dequantise a GGUF file to a plain float32 checkpoint, once; later calls find it in a cache.

    The cache is `$LONGCTX_CACHE` (default `~/.cache/longctx`), keyed by the file's content.

    Raises:
        ModelError: not a GGUF file, cut off, of an unsupported architecture, or no `gguf` package.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} does not begin with 'GGUF': it is corrupt or something else.")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    root = Path(os.environ.get("LONGCTX_CACHE", Path.home() / ".cache" / "longctx"))
    out = root / "gguf" / digest[:32]
    if out.exists():
        return out
    try:
        metadata.version("gguf")
    except metadata.PackageNotFoundError as error:
        raise ModelError(
            "reading GGUF needs the gguf package: pip install 'longctx-toolkit[gguf]'"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        quantised = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    except Exception as error:  # the reader fails in as many ways as a file can be broken
        raise ModelError(
            f"cannot read {path}: {type(error).__name__}: {error}. The file is cut off, corrupt, "
            "or of an architecture that transformers does not dequantise."
        ) from error
    # A model read from GGUF refuses casts and saving; a plain one takes its weights over.
    config = type(quantised.config).from_dict(quantised.config.to_dict())
    for key in ("quantization_config", "_pre_quantization_dtype"):
        config.__dict__.pop(key, None)
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    with new_folder(out) as folder:
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return out
