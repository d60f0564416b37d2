"""The examples of CONTRIBUTING.md are methods: as they stand there, they pass the matrix."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import longctx

from ..shipping import Property, check, label, properties, shipped

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
FILES = {
    re.findall(r'name: ClassVar\[str\] = "(\w+)"', text)[0]: text
    for text in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    if "METHOD =" in text
}


def test_there_is_an_example_for_each_base() -> None:
    assert len(FILES) == 2
    for base in ("FrequencyMethod", "AttentionMethod"):
        assert sum(f"({base}):" in text for text in FILES.values()) == 1
    for name in FILES:
        assert f"`patches/{name}.py`" in GUIDE


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("case", properties(), ids=label)
def test_an_example_passes_the_matrix(case: Property, name: str, tmp_path: Path) -> None:
    with shipped(tmp_path, name, FILES[name]):
        assert name in longctx.available()
        check(case, name, tmp_path)
    assert name not in longctx.available()


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_in_the_style_of_the_house(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.py"
    path.write_text(FILES[name])
    settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *settings, str(path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
