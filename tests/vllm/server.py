"""A real vLLM on a loopback port, as docs/guides/vllm.md starts it, but for what only a CPU needs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from app.cli.ports import free_port
from app.cli.processes import Processes, ProcessSpec
from tests.conftest import ROOT
from worker.environment import TENSORS

PYTHON = ROOT / ".cache" / "vllm" / "bin" / "python"
READY_SECONDS = 300
FLAGS = (
    "--enable-lora",
    "--max-loras 4",
    "--generation-config vllm",
    "--logprobs-mode processed_logprobs",
    "--enable-prefix-caching",
    "--enable-prompt-tokens-details",
    "--max-model-len 2048",
    "--max-num-seqs 16",
)
"""What the guide's command has too; a test of the house compares."""

RANK = 8
ON_A_CPU = [
    "--enforce-eager",  # compiling takes longer than all that the tests ask for
    # Its products with adapters copy, for each token, weights as wide as the widest adapter that is allowed.
    *("--max-lora-rank", str(RANK)),
    *("--block-size", "32"),  # of 128 otherwise: less than that of a prompt is not cached
]


@contextmanager
def vllm_server(base: Path, adapters: Path, dtype: str, secret: str) -> Iterator[str]:
    """The URL of a vLLM that serves the exported base in the directory `base`, and adapters from that folder.

    Ends with its whole process batch. Raises AssertionError with its last lines when it does not become ready.
    """
    port = free_port()
    # Its resolver compares an adapter's base with the model as named here, so: the digest, seen from beside it.
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", base.name]
    command += [*" ".join(FLAGS).split(), *ON_A_CPU]
    command += ["--dtype", dtype, "--host", "127.0.0.1", "--port", str(port)]
    lines: list[str] = []
    processes = Processes(lambda _who, line: lines.append(line))
    started = ProcessSpec("vllm", ["env", "-C", str(base.parent), *command], _environment(adapters, secret), grace=30.0)
    try:
        processes.start(started)
        until_ready("vllm", f"http://127.0.0.1:{port}", processes, lines)
        yield f"http://127.0.0.1:{port}"
    finally:
        processes.stop()


def _environment(adapters: Path, secret: str) -> dict[str, str]:
    return TENSORS | {
        "VLLM_PLUGINS": "lora_filesystem_resolver",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(adapters),
        "VLLM_API_KEY": secret,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def until_ready(name: str, url: str, processes: Processes, lines: list[str]) -> None:
    """Wait for a server that `processes` runs under this name; `lines` are what it said so far."""
    until = time.monotonic() + READY_SECONDS
    while True:
        assert processes.running(name), "\n".join([f"{name} ended:", *lines[-80:]])
        assert time.monotonic() < until, "\n".join([f"{name} is not ready:", *lines[-80:]])
        try:
            if httpx.get(f"{url}/health", timeout=2, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
