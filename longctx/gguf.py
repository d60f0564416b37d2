"""GGUF files as plain checkpoints, dequantised once."""

from __future__ import annotations

import hashlib
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from .errors import ModelError, RunError
from .folders import new_folder
from .serving.gguf_pretokenizers import cut_as_named
from .weights import refuse_incomplete

__all__ = ["convert_gguf"]

_FORM = 2
"""Of what is made of a file: raised where that changes, so that no earlier conversion is found."""


def convert_gguf(path: Path) -> Path:
    """Dequantise a GGUF file to a plain float32 checkpoint, once; later calls find it in a cache.

    The cache is `$LONGCTX_CACHE` (default `~/.cache/longctx`), keyed by the file's content.

    Raises:
        ModelError: not a GGUF file, cut off, of an unsupported architecture, or no `gguf` package.
        RunError: the cache cannot be written.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error}. Name a file that can be read.") from error
    if start != b"GGUF":
        raise ModelError(f"{path} does not begin with 'GGUF': it is corrupt or something else.")
    root = Path(os.environ.get("LONGCTX_CACHE", Path.home() / ".cache" / "longctx")) / "gguf"
    out = root / f"{digest[:32]}-{_FORM}"
    if out.exists():
        return out
    try:
        metadata.version("gguf")
    except metadata.PackageNotFoundError as error:
        raise ModelError(
            "reading GGUF needs the gguf package: pip install 'longctx-toolkit[gguf]'"
        ) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{out.name}.lock"):  # of several who come first, one converts
            if not out.exists():
                _convert(path, out)
    except OSError as error:
        raise RunError(
            f"cannot write to the cache {root}: {error}. Make room, or set LONGCTX_CACHE to a "
            "folder elsewhere."
        ) from error
    return out


def _convert(path: Path, out: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix="longctx-gguf-") as folder:
            # Alone, since transformers would read configs and code that lie beside it.
            alone = Path(folder) / "model.gguf"
            alone.symlink_to(path.resolve())
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=alone.name)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=alone.name, dtype=torch.float32, output_loading_info=True
            )
        quantised: Any = loaded[0]
        # What a file holds beside (rope_freqs, say) is transformers' to know.
        refuse_incomplete(path, quantised, {**loaded[1], "unexpected_keys": ()})
    except ModelError:
        raise
    except Exception as error:  # the reader fails in as many ways as a file can be broken
        raise ModelError(
            f"cannot read {path}: {type(error).__name__}: {error}. The file is cut off, corrupt, "
            "or of an architecture that transformers does not dequantise."
        ) from error
    cut_as_named(tokenizer, path)
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
