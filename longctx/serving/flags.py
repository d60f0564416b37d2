"""The command that starts an engine on a checkpoint, with all that the engine would guess wrong.

    print(flags_of("demo-1k", config, "vllm").command)

A length is always named: an engine that takes it from the config may multiply it (vLLM with linear
scaling) or cut it (llama.cpp's default context).
"""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engines import Checkpoint, Engine, checkpoint_of, reading

__all__ = ["Flags", "flags_of"]

_ALIBI_PLUGIN = "longctx.serving.vllm_alibi"
_INSTEAD = {
    "dynamic": "Extend the original by ntk for the length that you serve",
    "biases": "Serve it with longctx serve, or export it for llama.cpp (longctx export-gguf)",
    "proportional": "Serve it by transformers, or export it for llama.cpp (longctx export-gguf)",
    "beyond": "Serve it with longctx serve, or extend the original by a method that changes "
    "frequencies (yarn, linear, ntk, …)",
}
_KV_CACHE = {
    "vllm": "--kv-cache-dtype auto keeps keys and values in the model's dtype, fp8 does not",
    "sglang": "--kv-cache-dtype auto keeps keys and values in the model's dtype, fp8 does not",
    "llama.cpp": "keys and values are kept in f16, which moves log-probabilities by thousandths: "
    "-fa off -ctk f32 -ctv f32 is exact",
}


@dataclass(frozen=True, slots=True)
class Flags:
    """How to start an engine on a checkpoint."""

    engine: Engine
    window: int
    """Tokens that the commands name."""
    commands: tuple[tuple[str, ...], ...]
    """Commands with their arguments, to run one after the other; empty where the engine cannot
    give the checkpoint's numbers."""
    notes: tuple[str, ...]
    """What else is to be known; why there is no command, where there is none."""

    @property
    def command(self) -> str:
        """The commands as a shell takes them, one a line."""
        return "\n".join(shlex.join(command) for command in self.commands)


def flags_of(folder: Path | str, config: Mapping[str, Any], engine: Engine) -> Flags:
    """Say how an engine is started on a checkpoint so that it gives the checkpoint's numbers.

    Args:
        folder: where the checkpoint is, or its hub id.
        config: its config.json.
        engine: which engine.

    Returns:
        Commands, or none with the reason among the notes.
    """
    checkpoint = checkpoint_of(config)
    found = reading(checkpoint, engine)
    if found.does == "refused":
        instead = _INSTEAD.get(checkpoint.change, "Serve it by another engine")
        return _none(checkpoint, engine, f"{found.says}. {instead}.")
    if not checkpoint.window:
        return _none(checkpoint, engine, "config.json names no window (max_position_embeddings).")
    build = {
        "vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama_cpp, "transformers": _transformers,
        "mlx-lm": _mlx_lm, "ctranslate2": _ctranslate2,
    }  # fmt: skip
    return build[engine](str(folder), checkpoint, [found.says] if found.does != "reads" else [])


def _none(checkpoint: Checkpoint, engine: Engine, why: str) -> Flags:
    return Flags(engine, checkpoint.window, (), (why,))


def _vllm(folder: str, checkpoint: Checkpoint, notes: list[str]) -> Flags:
    overrides: dict[str, Any] = {}
    if checkpoint.change == "dynamic":
        overrides = _vllm_dynamic(checkpoint)
        notes.append(
            f"the base is that of a request of {checkpoint.window} tokens for every request: "
            "shorter ones differ from longctx.generate, which takes their own length"
        )
    if checkpoint.change == "biases":
        if importlib.util.find_spec(_ALIBI_PLUGIN) is None:
            why = f"{notes[0]}, which this installation does not have. {_INSTEAD['biases']}."
            return _none(checkpoint, "vllm", why)
        notes.append("longctx must be installed in vLLM's environment, where it finds the plugin")
    more = ("--hf-overrides", json.dumps(overrides, separators=(",", ":"))) if overrides else ()
    command = ("vllm", "serve", folder, "--max-model-len", str(checkpoint.window), *more)
    notes += [
        f"a prompt may have up to {checkpoint.window - 1} tokens: one is left for the answer",
        _KV_CACHE["vllm"],
    ]
    return Flags("vllm", checkpoint.window, (command,), tuple(notes))


def _vllm_dynamic(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config that vLLM computes our base from: its own takes the old window for the new."""
    rope = {key: value for key, value in checkpoint.rope.items() if key != "type"}
    return {
        "max_position_embeddings": checkpoint.window,
        "rope_parameters": {
            **rope,
            "rope_type": "dynamic",
            "max_trained_positions": checkpoint.original,
        },
    }


def _sglang(folder: str, checkpoint: Checkpoint, notes: list[str]) -> Flags:
    command = (
        *("python", "-m", "sglang.launch_server", "--model-path", folder),
        *("--context-length", str(checkpoint.window)),
    )
    notes += ["written from SGLang's documentation: it was not run here", _KV_CACHE["sglang"]]
    return Flags("sglang", checkpoint.window, (command,), tuple(notes))


def _llama_cpp(folder: str, checkpoint: Checkpoint, notes: list[str]) -> Flags:
    file = f"{_name(folder)}.gguf"
    export = ("longctx", "export-gguf", folder, file)
    serve = ("llama-server", "-m", file, "-c", str(checkpoint.window), "-np", "1")
    notes += [
        "-c is shared by all slots (-np): more slots leave each of them less",
        _KV_CACHE["llama.cpp"],
    ]
    return Flags("llama.cpp", checkpoint.window, (export, serve), tuple(notes))


def _transformers(folder: str, checkpoint: Checkpoint, notes: list[str]) -> Flags:
    notes.append(_no_window(checkpoint))
    trust = ("--trust-remote-code",) if checkpoint.by_code else ()
    command = ("transformers", "serve", folder, *trust)
    return Flags("transformers", checkpoint.window, (command,), tuple(notes))


def _mlx_lm(folder: str, checkpoint: Checkpoint, notes: list[str]) -> Flags:
    notes.append(_no_window(checkpoint))
    command = ("mlx_lm.server", "--model", folder)
    return Flags("mlx-lm", checkpoint.window, (command,), tuple(notes))


def _ctranslate2(folder: str, checkpoint: Checkpoint, notes: list[str]) -> Flags:
    out = f"{_name(folder)}-ctranslate2"
    command = ("ct2-transformers-converter", "--model", folder, "--output_dir", out)
    notes += [
        f"a library and not a server: ctranslate2.Generator({out!r})",
        _no_window(checkpoint),
    ]
    return Flags("ctranslate2", checkpoint.window, (command,), tuple(notes))


def _no_window(checkpoint: Checkpoint) -> str:
    return (
        f"no window is enforced: requests beyond {checkpoint.window} tokens are answered too, by "
        "what the model was not made for"
    )


def _name(folder: str) -> str:
    """What files made of a checkpoint are called."""
    return folder.rstrip("/").rpartition("/")[2] or "model"
