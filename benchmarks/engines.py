"""What engines do with checkpoints: `python -m benchmarks.engines WORK [MODEL [METHOD …]]`.

Every method that can be served is put on MODEL (the embedded one by default, 4-fold), saved, and
held against each engine's server by longctx's own commands: `serve-flags` names the command,
`export-gguf` writes the file for llama.cpp, `serve-check` compares prompts of 1 and 2 times the old
window and of the window less one. Libraries (mlx-lm, ctranslate2) load every checkpoint that they
take, and the same comparison is made in Python. An engine whose environment variable is not set
(`benchmarks/_servers.py`, `benchmarks/_in_process.py`) is left out.

The folder WORK keeps what was measured; a second run measures what is missing there (of the methods
that are named after MODEL, if there are any) and writes the tables to RESULTS.md and
docs/serving.md.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import longctx
from longctx.cli.main import main as command
from longctx.model import rope_of
from longctx.registry import method_class
from longctx.serving.check import check_server
from longctx.serving.engines import Engine, checkpoint_of, reading
from longctx.serving.flags import flags_of

from ._in_process import LIBRARIES, NotLoadedError, loaded
from ._measure import write_results
from ._servers import ENVIRONMENTS, python_of, serving, version_of

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
_BEGIN, _END = "<!-- written by python -m benchmarks.engines -->", "<!-- end -->"
_FACTOR = 4
_POSITIONS = 24  # of a prompt, where each costs a request
_ENGINES: tuple[Engine, ...] = (
    "vllm", "llama.cpp", "transformers", "mlx-lm", "ctranslate2",
)  # fmt: skip
_VARIANTS = (
    "yarn:factor=4,attention_factor=1.3",
    "yarn:factor=4,beta_fast=16.0,beta_slow=2.0",
)


def methods(model: Any) -> dict[str, Any]:
    """Every method that some engine can serve, at its example, and two of another setting."""
    rope = rope_of(model)
    found: dict[str, Any] = {"none": None}
    for name in longctx.available():
        kind = method_class(name)
        if not kind.trains_only and (kind.plain_loadable or kind.biases):
            example = kind.example(rope)
            own = {f.name for f in dataclasses.fields(example)}
            changes = {"factor": float(_FACTOR)} if "factor" in own else {}
            found[name] = dataclasses.replace(example, **changes)
    for text in _VARIANTS:
        found[text.replace("factor=4,", "", 1)] = longctx.parse_method(text)
    found["longrope:attention_factor=1.3"] = dataclasses.replace(
        found["longrope"], attention_factor=1.3
    )
    return found


def checkpoint(source: str, method: Any, folder: Path) -> Path:
    """The model with a method on it, saved once."""
    if not folder.exists():
        model, tokenizer = longctx.load(source, device="cpu", dtype="float32")
        if method is not None:
            longctx.extend(model, method)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            longctx.save(model, tokenizer, folder)
    return folder


def measure(
    engine: Engine, folder: Path, out: Path, more: Sequence[str] = (), threads: int = 1
) -> dict[str, Any]:
    """Serve a checkpoint, compare, and keep what was found.

    Args:
        engine: which.
        folder: the checkpoint.
        out: a JSON file to be written.
        more: further words for serve-check.
        threads: of a server.

    Returns:
        The JSON of serve-check, or {"refused": why}.
    """
    found: dict[str, Any]
    if engine in LIBRARIES:
        found = _by_library(engine, folder)
    else:
        found = _by_server(engine, folder, out.with_suffix(".part.json"), more, threads)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _by_library(engine: Engine, folder: Path) -> dict[str, Any]:
    model, tokenizer = longctx.load(folder, device="cpu", dtype="float32")
    try:
        with loaded(engine, folder) as library:
            found = check_server(model, tokenizer, library)
    except NotLoadedError as error:
        return {"refused": str(error)}
    return {**dataclasses.asdict(found), "ok": found.ok}


def _by_server(
    engine: Engine, folder: Path, part: Path, more: Sequence[str], threads: int
) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    flags = flags_of(folder, config, engine)
    if not flags.commands:
        return {"refused": flags.notes[0]}
    *before, server = flags.commands
    if before:
        file = folder.with_suffix(".gguf")
        server = tuple(str(file) if word.endswith(".gguf") else word for word in server)
        if command(["export-gguf", str(folder), str(file), "--dtype", "f32", "--overwrite"]):
            raise RuntimeError(f"{folder} was not exported")
    try:
        with serving(engine, server, threads=threads) as url:
            words = [str(folder), "--url", url, "--engine", engine, "--device", "cpu", *more]
            code = command(["serve-check", *words, "--out", str(part), "--overwrite"])
            if code not in (0, 1):
                raise RuntimeError(f"serve-check of {folder} ended with {code}")
            found: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
    except RuntimeError as error:
        return {"failed": str(error)[-600:]}
    return found


def nats(difference: float) -> str:
    """A difference of log-probabilities, in a table."""
    if difference < 0.1:
        return f"{difference:.0e}".replace("e-0", "e-")
    return f"{difference:.1f}"


def cell(found: Mapping[str, Any] | None) -> str:
    """What was found, in a table."""
    if found is None:
        return "not measured"
    if "refused" in found:
        return "refused"
    if "failed" in found:
        return "**does not start**"
    if not found["rows"]:
        return f"**{found['faults'][0]}**"
    if isinstance(found["rows"][0], list):  # texts
        same = sum(row[1] == row[2] for row in found["rows"])
        return f"{same} of {len(found['rows'])} answers the same"
    largest = nats(max(row["largest"] for row in found["rows"]))
    return largest if found["ok"] else f"**{largest}: {found['faults'][0].partition(':')[0]}**"


def contradicted(engine: Engine, folder: Path, found: Mapping[str, Any]) -> str:
    """Where longctx.serving.engines says otherwise than was found, in words; else empty."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said = reading(checkpoint_of(config), engine)
    if found.get("ok", False) == (said.does in ("reads", "needs")):
        return ""
    return f"{folder.name}: longctx says that {said}"


def lost(found: Mapping[str, Any] | None) -> str:
    """How far the unextended model is from ours."""
    rows = (found or {}).get("rows") or []
    between = [row["between"] for row in rows if isinstance(row, dict) and row["between"]]
    return f"{max(between):.1f}" if between else "–"


def write(table: list[dict[str, str]], notes: str) -> None:
    """Write the section of RESULTS.md and the table of the documentation."""
    write_results("What engines compute", "python -m benchmarks.engines WORK [MODEL]", table, notes)
    head = "| " + " | ".join(table[0]) + " |"
    lines = [
        head,
        f"|{'---|' * len(table[0])}",
        *("| " + " | ".join(row.values()) + " |" for row in table),
    ]
    text = PAGE.read_text(encoding="utf-8")
    body = f"{_BEGIN}\n\n" + "\n".join(lines) + f"\n\n{notes}\n\n{_END}"
    pattern = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    if not pattern.search(text):
        raise RuntimeError(f"{PAGE} has no place for the table ({_BEGIN})")
    PAGE.write_text(pattern.sub(lambda _: body, text), encoding="utf-8")


def main() -> None:
    """Measure what is missing and write the tables.

    Exit code 1 with what longctx.serving.engines says otherwise than was measured.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers end with this process
    if len(sys.argv) < 2:
        sys.exit("usage: python -m benchmarks.engines WORK [MODEL] [METHOD …]")
    work, source, only = Path(sys.argv[1]), "demo", sys.argv[3:]
    source = sys.argv[2] if len(sys.argv) > 2 else source
    work.mkdir(parents=True, exist_ok=True)
    model, _ = longctx.load(source, device="cpu", dtype="float32")
    engines: list[Engine] = [engine for engine in _ENGINES if python_of(engine)]
    absent = [f"{e} (${ENVIRONMENTS[e][0]})" for e in _ENGINES if e not in engines]
    print(f"engines: {', '.join(engines) or 'none'}; left out: {', '.join(absent) or 'none'}")
    table: list[dict[str, str]] = []
    wrong: list[str] = []
    for label, method in methods(model).items():
        folder = work / re.sub(r"[^\w.]+", "-", label)
        row, first = {}, None
        for engine in engines:
            out = work / f"{folder.name}.{engine}.json"
            found: dict[str, Any] | None = None
            if out.exists():
                found = json.loads(out.read_text(encoding="utf-8"))
            elif not only or label in only:
                print(f"{label} on {engine}", flush=True)
                found = measure(engine, checkpoint(source, method, folder), out)
            if found is not None:
                wrong += filter(None, [contradicted(engine, folder, found)])
            first = found if (found or {}).get("rows") and first is None else first
            row[engine] = cell(found)
        table.append({"method": label, "unextended": lost(first), **row})
    if not engines:
        return
    versions = ", ".join(f"{engine} {version_of(engine)}" for engine in engines)
    rope = rope_of(model)
    notes = (
        f"A model of {model.num_parameters() / 1e6:.1f} M parameters, rope_theta {rope.theta:g}, "
        f"window {rope.length}, {_FACTOR}-fold. {versions}; float32 on a CPU. "
        "Largest |Δ log p| of a prompt token against longctx, over "
        f"prompts of 1 and 2 times the old window and of the window less one; every token, with "
        f"llama.cpp {_POSITIONS} of each prompt (keys and values in f32, no fused attention). "
        "“unextended” is how far the model without the method is; “refused”: the engine does not "
        "load it, or serve-flags names no command and says why. Bold: it is another model. "
        + (f"Left out: {', '.join(absent)}." if absent else "")
    )
    write(table, notes.strip())
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
