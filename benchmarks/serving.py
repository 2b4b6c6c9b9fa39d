"""Starts inference servers over the same base and adapters: Veritune's, vLLM's and llama.cpp's."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from app.cli.ports import free_port
from benchmarks.deployment import BenchmarkError
from benchmarks.machine import ROOT

START_SECONDS = 240.0
VLLM = ROOT / ".cache" / "vllm" / "bin" / "python"
LLAMA_CPP = ROOT / ".cache" / "llama.cpp" / "build" / "bin" / "llama-server"

SLOT_TOKENS = 512
"""Tokens of a llama.cpp slot: prompt and completion of one row."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready. `seconds`: the time from its start until it was ready."""

    url: str
    pid: int
    seconds: float


@contextmanager
def veritune(table: Path, log: Path, **engine: object) -> Iterator[Server]:
    """The front over the models of `table`, with these engine settings."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.front", str(table), str(port), json.dumps(engine)]
    with _running(command, port, log, ROOT, {}) as server:
        yield server


@contextmanager
def vllm(base: Path, adapters: Path, log: Path, *, live: int, rows: int = 32) -> Iterator[Server]:
    """vLLM over a base, called as its directory is; a batch has room for `live` adapters (0: none) and `rows` rows."""
    port = free_port()
    command = [str(VLLM), "-m", "vllm.entrypoints.openai.api_server", "--model", base.name, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", str(rows)]
    command += [
        "--enable-prefix-caching",
        "--block-size",
        "32",
        "--enable-prompt-tokens-details",
        "--logprobs-mode",
        "processed_logprobs",
    ]
    if live:
        command += ["--enable-lora", "--max-loras", str(live), "--max-cpu-loras", "16", "--max-lora-rank", "8"]
    own = {
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_PLUGINS": "lora_filesystem_resolver",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(adapters),
    }
    with _running(command, port, log, base.parent, own) as server:
        yield server


@contextmanager
def llama_cpp(base: Path, adapters: Sequence[Path], log: Path, *, rows: int) -> Iterator[Server]:
    """llama.cpp's server over files of its own format, with a slot for each of `rows` rows."""
    port, threads = free_port(), str(os.cpu_count() or 1)
    command = [str(LLAMA_CPP), "--model", str(base), "--host", "127.0.0.1", "--port", str(port), "--offline"]
    command += ["--parallel", str(rows), "--ctx-size", str(rows * SLOT_TOKENS), "--threads", threads]
    if adapters:
        command += ["--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"]
    with _running(command, port, log, ROOT, {}) as server:
        yield server


@contextmanager
def application(home: Path, cache: Path, inference: str, log: Path) -> Iterator[Server]:
    """An API over the state in `home` whose answers come from the server at `inference`."""
    port = free_port()
    own = {
        "VERITUNE_HOME": str(home),
        "VERITUNE_CACHE": str(cache),
        "VERITUNE_PORT": str(port),
        "VERITUNE_INFERENCE_URL": inference,
    }
    command = [sys.executable, "-m", "app.cli", "api"]
    with _running(command, port, log, ROOT, own, "/health/live") as server:
        yield server


@contextmanager
def _running(
    command: Sequence[str], port: int, log: Path, directory: Path, own: dict[str, str], health: str = "/health"
) -> Iterator[Server]:
    began = time.perf_counter()
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, cwd=directory, env=os.environ | own, stdout=out, stderr=out, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _until_healthy(process, url + health, log)
        yield Server(url, process.pid, round(time.perf_counter() - began, 1))
    finally:
        _end(process)


def _until_healthy(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        if process.poll() is not None or time.monotonic() > until:
            raise BenchmarkError(f"{url} did not come up:\n{log.read_text(errors='replace')[-3000:]}")
        try:
            if httpx.get(url, trust_env=False, timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def _end(process: "subprocess.Popen[bytes]") -> None:
    family = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
    for left in psutil.wait_procs(family, timeout=10)[1]:
        left.kill()
