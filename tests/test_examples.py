"""The scripts in `examples/` run, on the embedded model and tiny settings."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = {
    "patch_existing_model.py": ["--tokens", "300", "--out", "patched"],
    "finetune_16k.py": [
        "--data",
        "chats.json",
        "--max-steps",
        "2",
        "--samples",
        "1",
        "--output-dir",
        "run",
    ],
    "length_sweep.py": [
        "--methods",
        "none",
        "yarn:2",
        "--lengths",
        "256,512",
        "--samples",
        "2",
        "--windows",
        "2",
    ],
    "stream.py": ["--window", "20", "--tokens", "70", "--every", "30"],
}
SAID = {
    "patch_existing_model.py": ("to the last bit: True", "logits within 0"),
    "finetune_16k.py": ("2 updates: loss", "run/model loads in plain transformers"),
    "length_sweep.py": ("passkey · demo", "runs/sweep/sweep.json", "passkey · against none"),
    "stream.py": ("at most 24 keys a layer", "60 tokens", "70 tokens", "24 keys", "MiB"),
}


def test_every_example_is_tried() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(QUICK) == set(SAID)


@pytest.mark.parametrize("name", QUICK)
def test_example(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exchange = [
        {"role": "user", "content": "What does the manual say about lists?"},
        {"role": "assistant", "content": "A list holds values in order, and may be changed."},
    ]
    monkeypatch.chdir(tmp_path)
    Path("chats.json").write_text(json.dumps([{"messages": exchange * 4}] * 6), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [name, *QUICK[name]])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = capsys.readouterr().out
    assert all(words in said for words in SAID[name])
