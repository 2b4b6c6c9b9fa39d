"""Runs `veritune up` as a user does, and records when each part is up."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from app.cli.ports import free_port
from benchmarks.machine import ROOT

START_SECONDS = 180.0
STOP_SECONDS = 90.0
ASK_SECONDS = 0.05


class BenchmarkError(Exception):
    """A benchmark cannot continue; the message says why."""


class Deployment:
    """A running `veritune up` over `home`. `marks`: seconds from its start to each named moment."""

    def __init__(
        self, home: Path, cache: Path, base: str = "smollm2-135m", start_seconds: float = START_SECONDS
    ) -> None:
        self.port = free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=600, trust_env=False)
        self.marks: dict[str, float] = {}
        self._start_seconds = start_seconds
        self._lines: list[tuple[float, str]] = []
        own = {
            "VERITUNE_HOME": str(home),
            "VERITUNE_CACHE": str(cache),
            "VERITUNE_DEFAULT_BASE_MODEL": base,
            "VERITUNE_PORT": str(self.port),
            "VERITUNE_INFERENCE_PORT": str(free_port()),
        }
        self._began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "up"],
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._until_ready()
        except BaseException:
            self.stop()
            raise

    def get(self, path: str) -> Any:
        return self._ok(self.client.get(path))

    def post(self, path: str, **arguments: Any) -> Any:
        return self._ok(self.client.post(path, **arguments))

    def until(self, job_id: str, *statuses: str, seconds: float = 120.0) -> Any:
        """Wait until the job's status is one of these; return the job."""
        until = time.monotonic() + seconds
        while True:
            job = self.get(f"/jobs/{job_id}")
            if job["status"] in statuses:
                return job
            if time.monotonic() > until or job["status"] in ("failed", "cancelled"):
                raise BenchmarkError(f"job {job_id} is {job['status']}: {job['error']}\n{self.tail()}")
            time.sleep(0.1)

    def pid(self, *words: str) -> int:
        """The process whose command line ends with these words."""
        return self._find(*words).pid

    def tail(self) -> str:
        return "\n".join(line for _, line in self._lines[-20:])

    def stop(self) -> None:
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        finally:
            self.client.close()
            for process in psutil.wait_procs(family, timeout=5)[1]:
                process.kill()

    def _ok(self, response: httpx.Response) -> Any:
        if not response.is_success:
            raise BenchmarkError(f"{response.request.method} {response.url.path}: {response.text[:500]}")
        return response.json()

    def _find(self, *words: str) -> psutil.Process:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if tuple(process.cmdline()[-len(words) :]) == words:
                return process
        raise BenchmarkError(f"no process ends in {' '.join(words)}\n{self.tail()}")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append((time.perf_counter() - self._began, line.decode(errors="replace").rstrip()))

    def _mark(self, name: str) -> None:
        self.marks.setdefault(name, round(time.perf_counter() - self._began, 2))

    def _until_ready(self) -> None:
        parts = {"base_model", "trainer", "inference"}
        while True:
            if self.process.poll() is not None or time.perf_counter() - self._began > self._start_seconds:
                raise BenchmarkError(f"veritune up did not become ready:\n{self.tail()}")
            try:
                answer = self.client.get("/health/ready")
            except httpx.TransportError:
                time.sleep(ASK_SECONDS)
                continue
            self._mark("api answers")
            missing = {found["loc"][0] for found in answer.json().get("errors", ())}
            for part in parts - missing:
                self._mark(f"{part} usable")
            if not missing:
                break
            time.sleep(ASK_SECONDS)
        self._mark("ready")
        self._mark_from_the_system()

    def _mark_from_the_system(self) -> None:
        """What no answer tells: when the broker spoke, and when the parts were started, the tables being there."""
        started = psutil.Process(self.process.pid).create_time()
        for name, words in (("parts started", ("-m", "worker.inference")), ("api started", ("app.cli", "api"))):
            self.marks[name] = round(self._find(*words).create_time() - started, 2)
        for at, line in self._lines:
            who, _, told = line.partition("│")
            if who.strip() == "broker":
                self.marks.setdefault("broker's first line", round(at, 2))
            elif "no base model yet" in told:
                self.marks["tables there"] = round(at, 2)
