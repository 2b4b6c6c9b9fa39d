"""A whole embedded deployment, started as a user starts it: `veritune up` over the real small base model."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.cli.broker import server_program
from app.cli.ports import free_port
from tests.conftest import MODEL_CACHE, ROOT
from tests.postgres import postgres_server

READY_SECONDS = 180
SECRET = "a secret of this test"
BASE = "smollm2-135m"


@dataclass
class Deployment:
    """A running `veritune up`."""

    process: "subprocess.Popen[bytes]"
    client: httpx.Client
    home: Path
    log: Path
    inference_url: str

    def get(self, path: str) -> Any:
        response = self.client.get(path)
        assert response.is_success, response.text
        return response.json()

    def post(self, path: str, **arguments: Any) -> Any:
        response = self.client.post(path, **arguments)
        assert response.is_success, response.text
        return response.json()

    def wait_for_job(self, job_id: str, seconds: float = 600) -> Any:
        until = time.monotonic() + seconds
        while True:
            job = self.get(f"/jobs/{job_id}")
            if job["status"] in ("succeeded", "failed", "cancelled"):
                return job
            assert time.monotonic() < until, f"{job['status']} {job['progress']}\n{self.log.read_text()[-3000:]}"
            time.sleep(0.3)

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def find(self, *words: str) -> psutil.Process:
        """The one process whose command line ends in these words."""
        found = [p for p in self.processes() if tuple(command_of(p)[-len(words) :]) == words]
        assert found, [command_of(p) for p in self.processes()]
        return found[0]


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; nothing when it has just ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie is one, too
        return []


def start(home: Path, **environment: str) -> Deployment:
    """Start it and wait until it is ready. The caller stops it with `stop`."""
    port, inference_port = free_port(), free_port()
    own = {
        "VERITUNE_HOME": str(home),
        "VERITUNE_CACHE": str(MODEL_CACHE),
        "VERITUNE_PORT": str(port),
        "VERITUNE_INFERENCE_PORT": str(inference_port),
        "VERITUNE_INFERENCE_SECRET": SECRET,
        "VERITUNE_DEFAULT_BASE_MODEL": BASE,
        "VERITUNE_POLL_SECONDS": "0.5",
        "VERITUNE_LEASE_SECONDS": "10",
        "VERITUNE_INFERENCE_DTYPE": "float32",  # so that its logits can be compared to the last digits
    }
    home.mkdir(parents=True, exist_ok=True)
    log = home / "up.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "up"],
            env=os.environ | own | environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)
    deployment = Deployment(process, client, home, log, f"http://127.0.0.1:{inference_port}")
    try:
        _until_ready(deployment)
    except BaseException:
        stop(deployment)
        raise
    return deployment


def _until_ready(deployment: Deployment) -> None:
    until = time.monotonic() + READY_SECONDS
    while True:
        assert deployment.process.poll() is None, deployment.log.read_text()[-3000:]
        assert time.monotonic() < until, deployment.log.read_text()[-3000:]
        try:
            if deployment.client.get("/health/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def stop(deployment: Deployment) -> list[psutil.Process]:
    """SIGTERM; returns whoever of its processes is left, grandchildren included."""
    if deployment.process.poll() is not None:
        return []
    family = deployment.processes()
    deployment.process.send_signal(signal.SIGTERM)
    try:
        deployment.process.wait(90)
    finally:
        deployment.client.close()
        _gone, left = psutil.wait_procs(family, timeout=5)
        for process in left:
            process.kill()
    return left


@contextmanager
def redis_server() -> Iterator[str]:
    """A real server of its own on a loopback port; its URL."""
    port = free_port()
    command = [server_program(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module", params=["embedded", pytest.param("scaled", marks=pytest.mark.acceptance)])
def deployment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The embedded default; and the same with two settings changed: Postgres, and a Redis of its own."""
    with ExitStack() as stack:
        changed: dict[str, str] = {}
        if request.param == "scaled":
            changed["VERITUNE_DATABASE_URL"] = stack.enter_context(postgres_server()).url
            changed["VERITUNE_REDIS_URL"] = stack.enter_context(redis_server())
        running = start(tmp_path_factory.mktemp("up") / "home", **changed)
        yield running
        assert stop(running) == []
