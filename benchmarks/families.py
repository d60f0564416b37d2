"""Which families of transformers each kind of method serves: `python -m benchmarks.families`.

Every decoder that transformers knows is built tiny and random from its own config class. A method
is served if it is proven by logits when it is put on (cached as uncached among that), undone bit by
bit, and saved and loaded again to the same logits; else the table has the reason that `extend`
gave. A family that fails in any other way ends the run with exit status 1.
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import longctx
from longctx.checkpoint import load_tokenizer
from longctx.errors import LongctxError

METHODS = ("linear:4", "yarn:4", "dynamic:4", "alibi:4")
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
WINDOW = 64
_BEGIN = "<!-- written by python -m benchmarks.families -->"
_LARGEST = 20_000_000  # parameters
_log = logging.getLogger(__name__)
_VOCABULARY = 1024  # that of the embedded tokenizer
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "sliding_window": 24,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "layer_types": None,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": _VOCABULARY,
}
_FURTHER: dict[str, dict[str, Any]] = {
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"num_kv_shared_layers": 0},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "phimoe": {"original_max_position_embeddings": WINDOW},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 1},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 32, "attn_layer_indices": [0, 2]},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "llama4_text": {"attention_chunk_size": 32, "intermediate_size_mlp": 96},
}
"""What a family needs beside the sizes to be built tiny."""
_KEPT = ("sliding_window", "q_lora_rank")
"""Sizes that stay None where a family's default is None."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one method on one family."""

    served: bool
    reason: str = ""
    """Why it is refused; empty where it is served."""
    broken: bool = False
    """Whether it failed otherwise than by a refusal, or what it promised is not so."""


def tiny_config(family: str) -> PreTrainedConfig:
    """The family's own config class with small sizes."""
    config_class: Any = CONFIG_MAPPING[family]
    default = config_class()
    names = {*vars(default), *getattr(default, "attribute_map", {})}
    sizes = {
        key: value
        for key, value in _SIZES.items()
        if key in names and not (key in _KEPT and getattr(default, key, None) is None)
    }
    if (
        "num_key_value_heads" in names
        and default.num_key_value_heads == default.num_attention_heads
    ):
        sizes["num_key_value_heads"] = 4
    return config_class(**sizes | _FURTHER.get(family, {}))


def build(family: str) -> PreTrainedModel | None:
    """A tiny random model in eval mode; None where the family cannot be built so."""
    try:
        config = tiny_config(family)
        with torch.device("meta"):
            sketch: Any = AutoModelForCausalLM.from_config(config)
        if config.is_encoder_decoder or sketch.num_parameters() > _LARGEST:
            return None
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
        _logits(model)
    except Exception as error:  # whatever a config class says of sizes that it was not made for
        _log.info("%s is not built: %s: %s", family, type(error).__name__, error)
        return None
    return model


def _logits(model: Any) -> Tensor:
    ids = torch.randint(3, _VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def try_method(model: PreTrainedModel, method: str) -> Outcome:
    """Put the method on, take it off, save and load it."""
    native = _logits(model)
    try:
        patch = longctx.extend(model, method, replace=True)
    except LongctxError as error:
        if not torch.equal(_logits(model), native):
            return Outcome(False, "refused, and the model is not as before", broken=True)
        return Outcome(False, str(error))
    except Exception as error:
        return Outcome(False, f"{type(error).__name__}: {error}", broken=True)
    try:
        fault = _fault(model, native)
        patch.remove()
    except Exception as error:
        return Outcome(False, f"{type(error).__name__}: {error}", broken=True)
    if not torch.equal(_logits(model), native):
        fault = "undo leaves other logits"
    return Outcome(not fault, fault, broken=bool(fault))


def _fault(model: PreTrainedModel, native: Tensor) -> str:
    """What is wrong with the saved checkpoint; empty where nothing is."""
    wanted = _logits(model)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = Path(folder) / "out"
        saved = longctx.save(model, load_tokenizer("demo"), out)
        loaded, _ = longctx.load(out, device="cpu")
        again = _logits(loaded)
        if not torch.allclose(again, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max())):
            return f"longctx.load gives other logits, by {(again - wanted).abs().max():.1e}"
        if saved.plain:
            plain: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            if not torch.equal(_logits(plain.eval()), again):
                return "plain transformers gives other logits, and save said it would not"
        patch = longctx.patch_of(loaded)
        assert patch is not None
        patch.remove()
        off = (_logits(loaded) - native).abs().max()
        if not off <= 1e-4 * float(native.abs().max()):
            return f"undone after loading, other logits than the original's, by {off:.1e}"
    return ""


def _in_general(reason: str, family: str) -> str:
    """The reason without the names of family, class and method, so that it is said once."""
    said = reason.replace(repr(family), "X").replace("|", "\\|")
    said = re.sub(r"found [A-Za-z0-9]+\.", "found none.", said)
    said = re.sub(r"^[A-Za-z0-9]+Attention asks", "its attention asks", said)
    return re.sub(rf"^({'|'.join(m.partition(':')[0] for m in METHODS)}) ", "the method ", said)


def write_page(found: list[tuple[str, list[Outcome]]], left_out: list[str]) -> None:
    """Write the table, with the reasons below it, to the documentation.

    Args:
        found: families that were built, with the outcome of each method.
        left_out: those that were not.
    """
    reasons: dict[str, list[str]] = {}
    lines: list[str] = []
    for family, outcomes in found:
        cells: list[str] = []
        for one in outcomes:
            if one.served:
                cells.append("served")
                continue
            reason = _in_general(one.reason, family)
            cells.append(f"[{1 + list(reasons).index(reason)}]" if reason in reasons else "")
            if not cells[-1]:
                reasons[reason] = []
                cells[-1] = f"[{len(reasons)}]"
        lines.append(f"| {family} | {' | '.join(cells)} |")
    served = sum(any(one.served for one in outcomes) for _, outcomes in found)
    head = PAGE.read_text(encoding="utf-8").partition(_BEGIN)[0]
    PAGE.write_text(
        "\n".join(
            [
                head + _BEGIN,
                "",
                f"transformers {transformers.__version__}, torch {torch.__version__}: {served} of "
                f"{len(found)} families take at least one of these methods.",
                "",
                f"| family | {' | '.join(METHODS)} |",
                f"|{'---|' * (1 + len(METHODS))}",
                *lines,
                "",
                *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
                "",
                "Not tried, since no tiny model was built from their config class alone: "
                + ", ".join(left_out)
                + ".",
                "",
            ]
        ),
        encoding="utf-8",
    )


def main() -> None:
    """Try every family, or those that the command line names, and write the page."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    wanted = sys.argv[1:]
    found: list[tuple[str, list[Outcome]]] = []
    left_out: list[str] = []
    for family in wanted or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        model = build(family)
        if model is None:
            print(f"{family}: not built", flush=True)
            left_out.append(family)
            continue
        found.append((family, [try_method(model, method) for method in METHODS]))
        said = ("served" if o.served else "BROKEN" if o.broken else "refused" for o in found[-1][1])
        print(f"{family}:", *said, flush=True)
        for reason in dict.fromkeys(o.reason for o in found[-1][1] if wanted and o.reason):
            print(f"    {reason}")
    if not wanted:
        write_page(found, left_out)
    broken = [family for family, outcomes in found if any(o.broken for o in outcomes)]
    if broken:
        sys.exit(f"neither served nor refused: {', '.join(broken)}")


if __name__ == "__main__":
    main()
