"""Loading and saving: what is broken is named, and nothing that was there is lost."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import longctx
from longctx.checkpoint import load, save
from longctx.errors import LongctxError, MethodError, ModelError, RunError
from longctx.folders import new_folder

from ..families import build, tokens
from ..test_matrix import demo_tokenizer


def saved(folder: Path, method: str | None = None) -> Path:
    model = build("llama")
    if method:
        longctx.extend(model, method)
    save(model, demo_tokenizer(), folder)
    return folder


def test_a_plain_checkpoint_comes_back_unpatched_and_in_eval_mode(tmp_path: Path) -> None:
    model, tokenizer = load(saved(tmp_path / "x"), device="cpu")
    assert longctx.patch_of(model) is None
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.pad_token_id == 0
    half, _ = load(tmp_path / "x", device="cpu", dtype="bfloat16", attn="eager")
    assert half.dtype == torch.bfloat16
    assert vars(half.config)["_attn_implementation_internal"] == "eager"


def test_the_embedded_model_is_called_demo() -> None:
    model, tokenizer = load("demo", device="cpu")
    assert model.config.max_position_embeddings == 256
    assert tokenizer.eos_token_id is not None


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "nowhere.gguf"])
def test_a_missing_source_is_named(source: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load(source)


def test_a_folder_or_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json and 0 GGUF files"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="not a GGUF file"):
        load(tmp_path / "notes.txt")
    (tmp_path / "bad.gguf").write_bytes(b"hello")
    with pytest.raises(ModelError, match="does not begin with 'GGUF'"):
        load(tmp_path / "bad.gguf")


def test_a_cut_off_gguf_is_named_and_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGCTX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x00" * 16)
    with pytest.raises(ModelError, match=r"cannot read .*cut\.gguf"):
        load(tmp_path / "cut.gguf")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_corrupt_weights_and_configs_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "x")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot load"):
        load(folder)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="cannot load"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load"):
        load(folder)


def test_a_record_from_a_later_release_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "x", "yarn:4")
    config = json.loads((folder / "config.json").read_text())
    config["longctx"]["version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"version: expected 1, got 2\. Upgrade"):
        load(folder)


def test_a_taken_folder_is_refused_and_kept(tmp_path: Path) -> None:
    folder = saved(tmp_path / "x")
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(RunError, match="exists and is not empty"):
        saved(folder, "yarn:4")
    assert (folder / "mine.txt").read_text() == "precious"
    with pytest.raises(RunError, match=r"holds mine\.txt, which no checkpoint has"):
        save(build("llama"), demo_tokenizer(), folder, overwrite=True)
    (folder / "mine.txt").unlink()
    save(build("llama", num_hidden_layers=1), demo_tokenizer(), folder, overwrite=True)
    assert load(folder, device="cpu")[0].config.num_hidden_layers == 1


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    folder = saved(tmp_path / "x")
    before = sorted(path.name for path in folder.iterdir())
    with (
        pytest.raises(RunError, match="No space left on device"),
        new_folder(folder, overwrite=True) as staging,
    ):
        (staging / "half").write_text("half")
        raise OSError(28, "No space left on device")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(RunError, match="cannot write"):
        saved(tmp_path / "x")


def test_a_place_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write"):
        saved(tmp_path / "file" / "x")


def test_replaced_scaling_survives_the_round_trip(tmp_path: Path) -> None:
    shipped = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    model, ids = build("llama", rope_parameters=shipped), tokens(100)
    original = model(ids).logits
    longctx.extend(model, "yarn", factor=8, replace=True)
    wanted = model(ids).logits
    save(model, demo_tokenizer(), tmp_path / "x")
    again, _ = load(tmp_path / "x", device="cpu")
    assert torch.equal(again(ids).logits, wanted)
    patch = longctx.patch_of(again)
    assert patch is not None
    patch.remove()
    assert torch.equal(again(ids).logits, original)


def test_only_checkpoints_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for out, said in (
        (tmp_path, "is not a checkpoint folder"),
        (tmp_path / "thesis.txt", "is a file"),
    ):
        with pytest.raises(RunError, match=said):
            save(build("llama"), demo_tokenizer(), out, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_the_present_folder_and_links_are_places_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    save(build("llama"), demo_tokenizer(), tmp_path / "link")
    load(folder, device="cpu")
    monkeypatch.chdir(folder)
    save(build("llama"), demo_tokenizer(), ".", overwrite=True)
    load(folder, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_of_two_who_save_to_one_new_folder_the_second_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="exists and is not empty"),
        new_folder(tmp_path / "x") as one,
    ):
        (one / "a").touch()
        saved(tmp_path / "x")
    load(tmp_path / "x", device="cpu")


def test_a_full_disk_is_named_by_safetensors_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **settings: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = build("llama")
    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(RunError, match="No space left on device"):
        save(model, demo_tokenizer(), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_config_that_was_edited_after_saving_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "x", "yarn:4")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["factor"] = 8.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="it was edited after saving"):
        load(folder, device="cpu")


def test_others_may_read_what_is_saved(tmp_path: Path) -> None:
    folder = saved(tmp_path / "x")
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_older_servers_find_the_settings_in_their_keys(tmp_path: Path) -> None:
    config = json.loads((saved(tmp_path / "x", "yarn:4") / "config.json").read_text())
    assert config["rope_scaling"] == config["rope_parameters"]
    assert config["rope_scaling"]["rope_type"] == "yarn"
    base = json.loads((saved(tmp_path / "y", "ntk:4") / "config.json").read_text())
    assert base["rope_theta"] == base["rope_parameters"]["rope_theta"] > 1e4
    assert "rope_scaling" not in base  # a base alone is not a scaling


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ORIGINAL = {"max_position_embeddings": 64, "rope_parameters": _ROPE}
_METHOD = {"name": "yarn", "factor": 4.0}


def _longctx(**changes: Any) -> dict[str, Any]:
    return {"version": 1, "original": _ORIGINAL, "methods": [_METHOD], **changes}


@pytest.mark.parametrize(
    "record",
    [
        "x",
        3,
        [],
        {},
        {"version": 1, "methods": []},
        _longctx(version=0),
        _longctx(version="1"),
        _longctx(version=None),
        _longctx(original=None),
        _longctx(original=[]),
        _longctx(original={}),
        _longctx(original={"max_position_embeddings": 64}),
        _longctx(original={**_ORIGINAL, "max_position_embeddings": -64}),
        _longctx(original={**_ORIGINAL, "max_position_embeddings": 0}),
        _longctx(original={**_ORIGINAL, "max_position_embeddings": "64"}),
        _longctx(original={**_ORIGINAL, "max_position_embeddings": 10**30}),
        _longctx(original={**_ORIGINAL, "max_position_embeddings": 64.5}),
        _longctx(original={**_ORIGINAL, "rope_parameters": []}),
        _longctx(methods=None),
        _longctx(methods=[]),
        _longctx(methods=["yarn"]),
        _longctx(methods={"yarn": 4}),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, record: object) -> None:
    folder = saved(tmp_path / "x", "yarn:4")
    config = json.loads((folder / "config.json").read_text())
    config["longctx"] = record
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json, entry longctx: .* Extend the original"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"original": {**_ORIGINAL, "rope_parameters": {"rope_type": "default"}}},
        {"original": {**_ORIGINAL, "rope_parameters": {**_ROPE, "rope_theta": "b"}}},
        {"methods": [{}]},
        {"methods": [{"name": 3}]},
        {"methods": [{"name": "yarm"}]},
        {"methods": [{**_METHOD, "factr": 2}]},
        {"methods": [{**_METHOD, "factor": "four"}]},
    ],
)
def test_settings_of_a_record_that_cannot_be_are_named(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = saved(tmp_path / "x", "yarn:4")
    config = json.loads((folder / "config.json").read_text())
    config["longctx"] = _longctx(**changes)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LongctxError):
        load(folder, device="cpu")


def test_a_patch_that_plain_transformers_loaded_is_not_extended_again(tmp_path: Path) -> None:
    folder = saved(tmp_path / "x", "ntk:4")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for damaged in ("x", 5, [1], {"methods": [1]}, {"methods": 5}):
        other = AutoModelForCausalLM.from_pretrained(folder)
        other.config.longctx = damaged
        with pytest.raises(MethodError, match="its record is damaged"):
            longctx.extend(other, "yarn", factor=2)
    with pytest.raises(MethodError, match=r"extended before \(ntk\).*load it with longctx.load"):
        longctx.extend(plain, "yarn", factor=2)


def test_methods_that_plain_transformers_left_out_are_not_saved_as_if_in_place(
    tmp_path: Path,
) -> None:
    with pytest.warns(UserWarning, match="dual_chunk cannot be said"):
        folder = saved(tmp_path / "x", "dual_chunk:4")
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), demo_tokenizer()
    with pytest.raises(ModelError, match=r"dual_chunk, which is not in place.*longctx\.load"):
        longctx.save(plain, tokenizer, tmp_path / "y")
    delattr(plain.config, "longctx")
    assert longctx.save(plain, tokenizer, tmp_path / "y").plain
    loaded = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "z", "yarn:4"))
    assert longctx.save(loaded, tokenizer, tmp_path / "again").plain  # its config says the method
    loaded.config.longctx = "abc"
    with pytest.raises(ModelError, match=r"config\.longctx: expected"):
        longctx.save(loaded, tokenizer, tmp_path / "damaged")


def test_a_device_that_is_not_there_is_named() -> None:
    for device in ("foo", "cuda:99"):
        with pytest.raises(ModelError, match=device if device == "foo" else "cannot load|cuda"):
            load("demo", device=device)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def silent(source: str, name: str, **_: Any) -> None:
        asked.append((source, name))
        raise OSError("no answer")

    for module in ("checkpoint", "weights"):
        monkeypatch.setattr(f"longctx.{module}.cached_file", silent)
    with pytest.raises(ModelError, match=r"taken for a hub id: check the name\): no answer"):
        longctx.load("some/model")
    assert asked == [("some/model", "config.json")]


@pytest.mark.parametrize("wrong", [None, 3, [], b"demo"])
def test_wrong_types_are_refused_by_name(wrong: Any, tmp_path: Path) -> None:
    model, tokenizer = longctx.load("demo", device="cpu")
    with pytest.raises(ModelError, match="expected a transformers model"):
        longctx.extend(wrong, "linear:4")
    with pytest.raises(ModelError, match="expected a folder, a GGUF file or a hub id"):
        longctx.load(wrong)
    with pytest.raises(ModelError, match="expected the model's tokenizer"):
        longctx.save(model, wrong, tmp_path / "out")
    with pytest.raises(RunError, match="expected the path of a folder"):
        longctx.save(model, tokenizer, wrong)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("method", [None, "ntk:4"])
def test_a_base_is_said_at_the_top_too(family: str, method: str | None, tmp_path: Path) -> None:
    """Software that finds none there takes 10,000; transformers reads the same with it."""
    changes: Any = {}
    if family == "llama":
        changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
    model, ids = build(family, **changes), tokens(60)
    if method:
        longctx.extend(model, method)
    save(model, demo_tokenizer(), tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    entry = config["rope_parameters"]
    assert config["rope_theta"] == entry.get("full_attention", entry)["rope_theta"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("method", ["yarn:factor=4,attention_factor=1.3", "ntk_by_parts:4"])
def test_a_temperature_is_said_as_mscale_and_changes_nothing_here(
    method: str, tmp_path: Path
) -> None:
    """The formula of those who read `mscale` alone gives the factor; old checkpoints have none."""
    model, ids = build("llama"), tokens(200)
    longctx.extend(model, method)
    saved = save(model, demo_tokenizer(), tmp_path / "x")
    assert saved.plain
    path = tmp_path / "x/config.json"
    config = json.loads(path.read_text())
    entry = config["rope_parameters"]
    by_mscale = 0.1 * entry["mscale"] * math.log(entry["factor"]) + 1
    assert by_mscale == pytest.approx(entry["attention_factor"])
    assert entry["mscale_all_dim"] == 0
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    for key in ("mscale", "mscale_all_dim"):
        del config["rope_parameters"][key], config["rope_scaling"][key]
    for text in (path.read_text(), json.dumps(config)):
        path.write_text(text)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
        ours, _ = load(tmp_path / "x", device="cpu")
        with torch.no_grad():
            assert torch.equal(plain(input_ids=ids).logits, wanted)
            assert torch.equal(ours(input_ids=ids).logits, wanted)


def test_what_was_saved_is_said_engine_by_engine(tmp_path: Path) -> None:
    model = build("llama")
    longctx.extend(model, "linear:4")
    found = save(model, demo_tokenizer(), tmp_path / "x")
    said = {reading.engine: reading.does for reading in found.engines}
    assert said["transformers"] == "reads"
    assert said["vllm"] == said["llama.cpp"] == "needs"
    assert said["sglang"] == "unmeasured"
    assert "vllm: reads it, and multiplies the window" in str(found)
    longctx.extend(model, "log_n")
    with pytest.warns(UserWarning, match="cannot be said"):
        found = save(model, demo_tokenizer(), tmp_path / "y")
    assert {reading.does for reading in found.engines} == {"refused"}
