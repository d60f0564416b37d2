"""The planner against autograd's own count, measured peaks, and the train command."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, MixtralConfig

from benchmarks.planner import Case, Size, measured
from longctx.cli.plan import Plan
from longctx.cli.train import Train
from longctx.errors import LongctxError, ModelError, RunError
from longctx.train.engine.lora import Lora, add_lora
from longctx.train.engine.packed_attention import packed_attention
from longctx.train.memory.activations import outside, saved
from longctx.train.memory.advice import advise
from longctx.train.memory.model_spec import ModelSpec
from longctx.train.memory.plan_settings import PlanSettings
from longctx.train.memory.planner import plan
from longctx.train.memory.timeline import precision_policy_of

from ...families import build

TOKENS = 128
LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)
LLAMA_7B = LlamaConfig(max_position_embeddings=4096)  # Llama-2-7B's shape is the default


def small(layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def kept(model: Any, *, packed: bool = False, autocast: bool = False) -> int:
    """Bytes of all storages that autograd saves in a forward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters:
            alive[pointer] = tensor
        return tensor

    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    ids = torch.arange(TOKENS)[None] % 64
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(TOKENS)[None],
        "labels": ids,
        "document_ids": torch.zeros_like(ids),
    }
    attention = packed_attention(causal) if packed else None
    inputs = attention.inputs(batch) if attention else {"input_ids": ids, "use_cache": False}
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        causal.base_model(**inputs)
    if attention:
        attention.remove()
    return sum(tensor.untyped_storage().nbytes() for tensor in alive.values())


def counted(model: Any, settings: PlanSettings) -> float:
    """The same by the planner's formulas."""
    spec = ModelSpec.of(model)
    policy = precision_policy_of(spec, settings)
    total = TOKENS * (spec.layers * saved(spec, policy) + outside(spec, policy))
    matrices = sum(x.weights for x in spec.linears)
    if policy.half and not policy.rank:  # autocast's copies of the matrices are saved too
        total += 2 * spec.layers * matrices
    return total


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights_keep_what_autograd_saves(dtype: Any, packed: bool) -> None:
    settings = PlanSettings(max_length=TOKENS, dtype=dtype, pack=packed)
    found = kept(small(), packed=packed, autocast=dtype == "bfloat16")
    assert counted(small(), settings) == pytest.approx(found, rel=2e-3)


# peft asks transformers by a name that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "o_proj", "down_proj")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_keep_what_autograd_saves(dtype: Any, targets: tuple[str, ...]) -> None:
    settings = PlanSettings(
        max_length=TOKENS, dtype=dtype, pack=False, lora_r=4, lora_target_modules=targets
    )
    # The first layer's input needs no gradient under adapters: it alone keeps less, so that the
    # difference of two depths is what a layer keeps.
    half = dtype == "bfloat16"
    found: list[float] = []
    wanted: list[float] = []
    for layers in (2, 4):
        model = small(layers).to(getattr(torch, dtype))
        wanted.append(counted(model, settings))
        adapted = add_lora(model, Lora(r=4, target_modules=targets))
        adapters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        wanted[-1] += 2 * adapters * half  # autocast's copies of the adapters
        found.append(kept(adapted, autocast=half))
    assert wanted[1] - wanted[0] == pytest.approx(found[1] - found[0], rel=5e-3)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3", "phi3", "olmo2"])
def test_other_families_keep_about_as_much(family: str) -> None:
    """But for what is small at any other size: a sliding layer's mask and repeated heads."""
    model = build(family).train()
    settings = PlanSettings(max_length=TOKENS, dtype="float32", pack=False)
    assert counted(model, settings) == pytest.approx(kept(model), rel=0.08)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "phi3", "olmo2"])
def test_parameters_are_counted_without_weights(family: str) -> None:
    model = build(family)
    assert ModelSpec.of(model.config).parameters == sum(p.numel() for p in model.parameters())


def test_predictions_are_within_a_fifth_of_measured_peaks() -> None:
    size = Size(256, 688, 4, 4, 2, vocabulary=8192)
    cases = (
        Case(size, 2048),
        Case(size, 2048, "layers"),
        Case(size, 2048, loss="plain", optimizer="sgd"),
        Case(size, 2048, lora=True),
    )
    for case, peak in zip(cases, measured(cases), strict=True):
        print(case.plan().total * 1024, peak)
        assert case.plan().total * 1024 == pytest.approx(peak, rel=0.2), case


def test_states_of_full_training_take_16_bytes_per_parameter() -> None:
    """As Rajbhandari et al. 2020 (ZeRO, section 3.1) count, with masters in place of two copies."""
    update = plan(LLAMA_7B, PlanSettings(max_length=16, optimizer="adamw_torch_fused")).timeline[-1]
    assert update.total * 2**30 == pytest.approx(16 * 6_738_415_616, rel=1e-9)


def test_sharding_divides_what_is_held() -> None:
    one = plan(LLAMA_7B, PlanSettings(max_length=4096, gpus=8))
    eight = plan(LLAMA_7B, PlanSettings(max_length=4096, gpus=8, dp_shard=8))
    assert eight.peak.weights == pytest.approx(one.peak.weights / 8)
    assert eight.timeline[-1].gradients == pytest.approx(one.timeline[-1].gradients / 2 / 8)


def test_exchanging_heads_shares_the_states_and_nothing_else() -> None:
    """Over all 8 processes, with the weights that they belong to once more."""
    full: dict[str, Any] = {"max_length": 4096, "gpus": 8, "pack": False}
    one, shared = (plan(LLAMA_7B, PlanSettings(**full, sp=sp)) for sp in (1, 4))
    first, own = shared.timeline[0], one.timeline[0]
    assert first.weights == own.weights
    assert first.optimizer == pytest.approx((own.optimizer + own.weights) / 8)
    assert shared.total < one.total


def test_advice_shares_sequences_further_by_the_means_that_was_asked_for() -> None:
    asked = PlanSettings(max_length=131_072, gpus=8, sp=2, lora_r=16, memory=30, pack=False)
    found = advise(LLAMA_8B, asked).found.settings
    assert (found.cp, found.dp_shard) == (1, 1)
    assert found.sp == 4


def test_what_fits_is_left_alone() -> None:
    settings = PlanSettings(max_length=256, memory=8)
    advice = advise("demo", settings)
    assert advice.fits
    assert not advice.measures
    assert advice.found == advice.asked
    assert str(advice).startswith("It fits")
    assert "--method none" in advice.command


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"loss": "plain", "memory": 30, "lora_r": 16, "max_length": 8192}, {"loss"}),
        ({"memory": 40, "lora_r": 16}, {"gradient_checkpointing"}),
        ({"memory": 80}, {"gradient_checkpointing", "lora_r"}),
        ({"memory": 80, "gpus": 8}, {"gradient_checkpointing", "dp_shard"}),
        (
            {"memory": 80, "gpus": 8, "max_length": 262_144},
            {"gradient_checkpointing", "cp", "dp_shard"},
        ),
    ],
)
def test_advice_takes_what_is_needed_and_no_more(changes: dict[str, Any], wanted: set[str]) -> None:
    asked: dict[str, Any] = {"max_length": 16_384, **changes}
    settings = PlanSettings(**asked)
    advice = advise(LLAMA_8B, settings)
    assert not advice.asked.fits
    assert advice.fits
    taken = {name for measure in advice.measures for name in measure.changes}
    assert wanted <= taken
    for measure in advice.measures:  # each of them is needed, but for the free one
        if "loss" in measure.changes:
            continue
        rest = {k: v for m in advice.measures if m is not measure for k, v in m.changes.items()}
        assert not plan(LLAMA_8B, replace(settings, **rest)).fits
    trained = tyro.cli(Train, args=shlex.split(advice.command.partition("longctx train ")[2]))
    found = advice.found.settings
    assert trained.max_length == found.max_length
    assert trained.lora_r == found.lora_r
    assert (trained.norms, trained.embeddings) == (found.norms, found.embeddings)
    assert trained.no_pack is not found.pack
    assert bool(trained.evaluate) == (found.dp_shard * found.cp == 1)
    for name in ("gradient_checkpointing", "optimizer", "dp_shard", "cp", "sp", "batch_size"):
        assert getattr(trained, name) == getattr(found, name), name
    assert trained._recipe().training.dp_shard == found.dp_shard  # pyright: ignore[reportPrivateUsage]


def test_rows_of_a_batch_are_accumulated_before_anything_is_lost() -> None:
    asked = PlanSettings(max_length=8192, batch_size=8, lora_r=16, memory=70)
    advice = advise(LLAMA_8B, asked)
    found = advice.found.settings
    assert advice.fits
    assert found.batch_size * found.gradient_accumulation_steps == 8


def test_nothing_fits_and_it_says_by_how_much() -> None:
    advice = advise(LLAMA_8B, PlanSettings(max_length=16_384, memory=8))
    assert not advice.fits
    assert f"{-advice.found.margin:.2f} GiB" in str(advice)
    assert advice.found.total < advice.asked.total


def test_the_command_prints_a_table_and_exits_by_what_it_found(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B.to_dict()))
    arguments = [str(tmp_path), "--max-length", "16384", "--memory"]
    assert tyro.cli(Plan, args=["demo", "--max-length", "256"]).run() == 0
    assert "activations kept" in capsys.readouterr().out
    assert tyro.cli(Plan, args=[*arguments, "80"]).run() == 0
    assert f"longctx train {tmp_path} --method yarn:target=16384" in capsys.readouterr().out
    assert tyro.cli(Plan, args=[*arguments, "8"]).run() == 1
    assert "Nothing makes it fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": -1.0}, "memory=-1.0"),
        ({"memory": float("nan")}, "memory=nan"),
        ({"max_length": 0}, "max_length=0"),
        ({"optimizer": "adamw_8bits"}, "did you mean 'adamw_8bit'"),
        ({"gpus": 4, "cp": 3}, "gpus=4 is not a multiple"),
        ({"gpus": 4, "cp": 2}, "pass dp_shard=2"),
        ({"gpus": 6, "sp": 6}, "32 query heads"),
        ({"gpus": 8, "dp_shard": 2, "cp": 2, "sp": 2}, "both cut the sequence"),
        ({"gpus": 2, "cp": 2, "pack": True}, "and packing"),
        ({"gpus": 4, "dp_shard": 2, "sp": 2}, "DeepSpeed runs the one and FSDP the other"),
        ({"embeddings": True}, "pass lora_r too"),
        ({"lora_r": 8, "lora_target_modules": ("c_attn",)}, "c_attn"),
        ({"gradient_checkpointing": "all"}, "gradient_checkpointing='all'"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"max_length": 1024, "pack": False, **changes}
    with pytest.raises(RunError, match=message.replace("(", r"\(")):
        plan(LLAMA_8B, PlanSettings(**settings))


@pytest.mark.parametrize(
    "source",
    [GPT2Config(bos_token_id=1, eos_token_id=1), MixtralConfig(num_hidden_layers=1), "./nowhere"],
    ids=["gpt2", "mixtral", "nowhere"],
)
def test_models_that_are_not_known_are_refused(source: Any) -> None:
    with pytest.raises(LongctxError):
        plan(source, PlanSettings(max_length=1024))


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """A config that names a class of its own is refused before the file is touched."""
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="cannot read the config"):
        plan(str(tmp_path), PlanSettings(max_length=1024))
    assert not (tmp_path / "ran").exists()
