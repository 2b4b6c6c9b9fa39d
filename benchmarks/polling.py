"""Polls GET /jobs/{id}, and a bare FastAPI route under the same load, in alternating rounds."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from app.cli.ports import free_port
from benchmarks.deployment import BenchmarkError, Deployment
from benchmarks.first_update import SPEC
from benchmarks.machine import ROOT

PERIOD = 1.0
"""Seconds between the requests of a slow client."""

FIGURES = ("per_second", "p50_ms", "p99_ms", "server_cpu_us")

LONG = {"train_steps": 5_000, "effective_batch_size": 1, "learning_rate": 1e-4}
"""A job that outlasts the rounds. One row an update, so that its pace shows in a few seconds."""

Arms = dict[str, tuple[int, int, str]]
"""The routes to poll: name → (process id, port, path)."""

Rounds = dict[str, list[dict[str, float]]]


def polling(deployment: Deployment, directory: Path, clients: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Poll without training, then while a job trains: at full speed, and once a second for each client."""
    job = deployment.get("/jobs")["data"][0]["id"]
    with _bare(deployment, job, directory) as bare:
        api = deployment.pid("app.cli", "api")
        quiet: Arms = {"veritune": (api, deployment.port, f"/jobs/{job}"), **bare}
        found: dict[str, Any] = {"clients": clients, "answer_bytes": (directory / "answer.json").stat().st_size}
        found["idle_fast"] = _rounds(quiet, clients, seconds, 0.0, rounds)
        training = deployment.post("/jobs", json=SPEC | {"trainer": LONG})["id"]
        _until_it_trains(deployment, training)
        arms: Arms = {"veritune": (api, deployment.port, f"/jobs/{training}"), **bare}
        paced = {name: arms[name] for name in ("veritune", "bare_plain")}
        found["updates_a_second_alone"] = _pace(deployment, training, seconds * rounds)
        found["training_fast"] = _rounds(arms, clients, seconds, 0.0, rounds)
        began, before = time.monotonic(), _update(deployment, training)
        found["training_paced"] = _rounds(paced, clients, seconds, PERIOD, rounds)
        passed = time.monotonic() - began
        found["updates_a_second_under_paced_load"] = round((_update(deployment, training) - before) / passed, 2)
        still = deployment.get(f"/jobs/{training}")["status"]
        if still != "running":
            raise BenchmarkError(f"the job that was to train all the while is {still}")
        deployment.post(f"/jobs/{training}/cancel")
        deployment.until(training, "cancelled")
    return found


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: median(one[key] for one in rounds) for key in FIGURES}


def _rounds(arms: Arms, clients: int, seconds: float, period: float, times: int) -> Rounds:
    """Each arm once a round, turn and turn about."""
    found: Rounds = {name: [] for name in arms}
    for _ in range(times):
        for name, (pid, port, path) in arms.items():
            spent = _processor_seconds(pid)
            one = _load(port, path, clients, seconds, period)
            one["server_cpu_us"] = round((_processor_seconds(pid) - spent) / max(1, one["requests"]) * 1e6)
            if one["failed"]:
                raise BenchmarkError(f"{one['failed']:.0f} of the requests to {name} had no good answer")
            found[name].append(one)
            time.sleep(0.3)
    return found


def _load(port: int, path: str, clients: int, seconds: float, period: float) -> dict[str, float]:
    words = [str(port), path, "--clients", str(clients), "--seconds", str(seconds), "--period", str(period)]
    command = [sys.executable, "-m", "benchmarks.load", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=seconds + 60)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _processor_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextmanager
def _bare(deployment: Deployment, job: str, directory: Path) -> Iterator[Arms]:
    """The two bare routes, answering what GET /jobs/{id} answers now, in a process of their own."""
    answer, port = directory / "answer.json", free_port()
    answer.write_bytes(deployment.client.get(f"/jobs/{job}").content)
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.bare", str(port), str(answer)], cwd=ROOT)
    try:
        _until_it_answers(f"http://127.0.0.1:{port}/plain/{job}")
        pid = process.pid
        yield {"bare_plain": (pid, port, f"/plain/{job}"), "bare_ready": (pid, port, f"/ready/{job}")}
    finally:
        process.terminate()
        process.wait(10)


def _until_it_answers(url: str, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            httpx.get(url, trust_env=False).raise_for_status()
            return
        except httpx.TransportError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _update(deployment: Deployment, job: str) -> int:
    return int(deployment.get(f"/jobs/{job}")["progress"]["update"])


def _until_it_trains(deployment: Deployment, job: str) -> None:
    deployment.until(job, "running")
    until = time.monotonic() + 120
    while _update(deployment, job) < 2:
        if time.monotonic() > until:
            raise BenchmarkError(f"{job} does not get on\n{deployment.tail()}")
        time.sleep(0.2)


def _pace(deployment: Deployment, job: str, seconds: float) -> float:
    """Training updates per second without any polling."""
    began, before = time.monotonic(), _update(deployment, job)
    time.sleep(seconds)
    return round((_update(deployment, job) - before) / (time.monotonic() - began), 2)
