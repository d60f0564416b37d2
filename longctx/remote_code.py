"""Checkpoints that transformers loads with their method in place, by a module beside them.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Their config.json has a model type of our own, so that nothing loads the unextended model unasked:
transformers refuses the folder without `trust_remote_code=True`, and engines refuse it as a type
that they do not know. The entry "longctx" keeps the family's own type. What the module loads is the
family's own class and config, as `longctx.load` does without running anything from the folder.

`architectures` names AutoModelForCausalLM, since `transformers serve` loads the class of that name.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from .errors import ModelError
from .patch import methods_of, patch_of
from .proof import apart, can_run
from .record import restore
from .twin import build_with_weights

__all__ = [
    "MODEL_TYPE",
    "MODULE_FILE",
    "MODULE_TEXT",
    "RemoteConfig",
    "RemoteModel",
    "is_remote",
    "load_config",
    "remote_twin",
    "write_remote_code",
]

MODEL_TYPE = "longctx"
"""The model type in config.json, which is not one of transformers'."""
MODULE_FILE = "modeling_longctx.py"
MODULE_TEXT = '''\
"""Loads this checkpoint with the method that its config.json records (entry "longctx")."""

try:
    from longctx.remote_code import RemoteConfig, RemoteModel
except ImportError as error:
    raise ImportError(
        f"this checkpoint needs longctx, which cannot be imported here ({error}): "
        "pip install longctx-toolkit"
    ) from error

__all__ = ["RemoteConfig", "RemoteModel"]
'''
"""The whole of MODULE_FILE."""
_AUTO_MAP = {
    "AutoConfig": f"{Path(MODULE_FILE).stem}.RemoteConfig",
    "AutoModelForCausalLM": f"{Path(MODULE_FILE).stem}.RemoteModel",
}
_ANEW = "Save it anew with longctx.save(…, remote_code=True)."


def is_remote(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a checkpoint with our module beside it."""
    return config.get("model_type") == MODEL_TYPE


def write_remote_code(folder: Path, model: PreTrainedModel) -> None:
    """Make a saved checkpoint one that the module beside it loads.

    Args:
        folder: as `save_pretrained` wrote it.
        model: that was saved.

    Raises:
        ModelError: there is no method on the model, or its class is not one of transformers'.
    """
    if patch_of(model) is None:
        raise ModelError(
            "remote_code=True for a model without a method: there is nothing for the code to put "
            "in place. Extend it first (longctx.extend), or leave remote_code out."
        )
    if type(model.config) not in AutoModelForCausalLM._model_mapping:  # pyright: ignore[reportPrivateUsage]
        raise ModelError(
            f"remote_code=True for model type {model.config.model_type!r}, which is not one of "
            "transformers' causal language models: expected Llama, Qwen3, Gemma-3 or their like."
        )
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config |= {
        "model_type": MODEL_TYPE,
        "architectures": [AutoModelForCausalLM.__name__],
        "auto_map": _AUTO_MAP,
        "longctx": {**config["longctx"], "native_type": config["model_type"]},
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / MODULE_FILE).write_text(MODULE_TEXT)


def remote_twin(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """What a checkpoint's module builds, with the weights of `model`, to be compared with it.

    The module is run, the family's class is built from the config that it gives, and the record is
    put in place on it, where each method proves its effect. No weight is read or copied.

    Raises:
        ModelError: transformers loads the folder's config without `trust_remote_code=True`, the
            record names other methods than the model has, its logits are others, or it cannot be
            built (weights that are quantized, or not all on one device).
    """
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError:
        pass
    else:
        raise ModelError("transformers takes its config without trust_remote_code=True")
    if len(devices := {str(parameter.device) for parameter in model.parameters()}) > 1:
        raise ModelError(f"its weights are on several devices: {', '.join(sorted(devices))}")
    config = _module(folder).RemoteConfig.from_pretrained(folder)
    twin = build_with_weights(type(model), config, model.state_dict(), dict(model.named_buffers()))
    restore(twin)
    patch = patch_of(model)
    if (its := methods_of(twin)) != (own := methods_of(model)) or patch is None:
        raise ModelError(f"the model has {[*own]}, as saved {[*its]}")
    if can_run(model) and (wrong := apart(model, twin, patch)):
        raise ModelError(wrong)
    return twin


def _module(folder: Path) -> Any:
    """The module of a checkpoint, as it stands there."""
    spec = importlib.util.spec_from_file_location("longctx_checkpoint", folder / MODULE_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_config(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A checkpoint's config as `longctx.load` takes it: our module is not run for it.

    Raises:
        ValueError: as transformers does, also for other code that is not trusted.
        ModelError: a damaged entry "longctx".
    """
    found, _ = PreTrainedConfig.get_config_dict(source)
    if not is_remote(found):
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    config = RemoteConfig.from_pretrained(source)
    del config.auto_map
    return config


class RemoteConfig:
    """What a checkpoint's auto_map names as its config class: it gives the family's own."""

    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoConfig") -> None:
        """Nothing: the module lies beside what is saved by `longctx.save` alone."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **settings: Any) -> Any:
        """As `PreTrainedConfig.from_pretrained`.

        Raises:
            ModelError: config.json does not name the family's type.
        """
        found, rest = PreTrainedConfig.get_config_dict(source, **settings)
        record = found.get("longctx")
        kind = record.get("native_type") if isinstance(record, dict) else None
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise ModelError(
                f"{source}/config.json, entry longctx: native_type: expected a model type that "
                f"transformers knows, and it is {kind!r:.80}. {_ANEW}"
            )
        return CONFIG_MAPPING[kind].from_dict({**found, "model_type": kind}, **rest)


class RemoteModel:
    """What a checkpoint's auto_map names as its model class: it gives the family's own, patched."""

    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoModelForCausalLM") -> None:
        """Nothing: see `RemoteConfig`."""

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *args: Any, config: PreTrainedConfig, **settings: Any
    ) -> Any:
        """As `AutoModelForCausalLM.from_pretrained`, with the recorded methods in place.

        Raises:
            LongctxError: a damaged record, or one that does not fit the model.
        """
        delattr(config, "auto_map")  # else this would be called again
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, *args, config=config, **settings)
        restore(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
        """As `AutoModelForCausalLM.from_config` takes it: a model without its weights."""
        delattr(config, "auto_map")
        model = AutoModelForCausalLM.from_config(config, **settings)
        restore(model)
        return model
