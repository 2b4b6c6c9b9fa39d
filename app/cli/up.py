"""`veritune up`: the embedded deployment. Starts the broker, migrates, fetches the base model, runs four processes."""

import contextlib
import errno
import fcntl
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO

import httpx

from app.cli.broker import broker_answers, broker_command
from app.cli.errors import CommandError
from app.cli.models import ensure_default
from app.cli.ports import free_port
from app.cli.processes import Processes, ProcessSpec
from app.composition import compose
from app.db.migrating import migrate
from app.settings import Settings

COLOURS = {"broker": 35, "api": 32, "trainer": 33, "runner": 36, "inference": 34, "up": 1}
CHECK_SECONDS = 0.2
BROKER_SECONDS = 15.0


def up(settings: Settings) -> None:
    """Run until SIGINT or SIGTERM. Both stop every process, with its children."""
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    settings.run_path.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings.home_path.mkdir(parents=True, exist_ok=True)
    with _lock_home(settings):
        _check_port_is_free(settings)
        environment = _environment(settings)
        processes = Processes(_print_line)
        try:
            _start(settings, environment, processes, over)
            _keep_running(settings, processes, over)
        finally:
            _print_line("up", "stopping")
            processes.stop()
            _print_line("up", "stopped")


def _start(settings: Settings, environment: dict[str, str], processes: Processes, over: threading.Event) -> None:
    if settings.redis_url is None:
        socket_path = settings.run_path / "redis.sock"
        processes.start(ProcessSpec("broker", broker_command(socket_path), {}))
        until = time.monotonic() + BROKER_SECONDS
        while not broker_answers(socket_path):
            if not processes.running("broker") or time.monotonic() > until:
                raise CommandError("the embedded broker did not start; its output above says why")
            time.sleep(0.05)
    migrate(settings.database)
    services = compose(settings)
    try:
        default = ensure_default(services, lambda line: _print_line("up", line))
    finally:
        services.close()
    if over.is_set():
        return
    for spec in _process_specs(settings, environment | {"VERITUNE_DEFAULT_BASE_MODEL": default}):
        processes.start(spec)


def _process_specs(settings: Settings, environment: dict[str, str]) -> list[ProcessSpec]:
    python = sys.executable
    gpu = environment | {"VERITUNE_WORKER_QUEUES": "gpu"}
    cpu = environment | {"VERITUNE_WORKER_QUEUES": "cpu"}
    inference = ProcessSpec("inference", [python, "-m", "worker.inference"], environment, grace=10.0)
    return [
        ProcessSpec("trainer", [python, "-m", "worker"], gpu, grace=60.0),
        ProcessSpec("runner", [python, "-m", "worker"], cpu, grace=20.0),
        *([inference] if settings.inference_url is None else []),
        ProcessSpec("api", [python, "-m", "app.cli", "api"], environment, grace=10.0),
    ]


def _keep_running(settings: Settings, processes: Processes, over: threading.Event) -> None:
    announced = False
    asked_at = 0.0
    while not over.wait(CHECK_SECONDS):
        processes.restart_ended()
        if not announced and time.monotonic() - asked_at > 0.5:
            asked_at = time.monotonic()
            announced = _ready(settings)
            if announced:
                _print_line("up", f"ready: {settings.api_url}/docs  (Ctrl-C stops everything)")


def _ready(settings: Settings) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{settings.api_url}/health/ready", timeout=2, trust_env=False).is_success
    return False


def _environment(settings: Settings) -> dict[str, str]:
    """Variables added for every process, so that all have the same home, secret and inference port."""
    environment = {"VERITUNE_HOME": str(settings.home_path), "PYTHONUNBUFFERED": "1"}
    if settings.inference_secret is None:
        environment["VERITUNE_INFERENCE_SECRET"] = secrets.token_urlsafe(32)
    if "inference_port" not in settings.model_fields_set:
        environment["VERITUNE_INFERENCE_PORT"] = str(free_port())
    return environment


def _check_port_is_free(settings: Settings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            setting = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"
            raise CommandError(
                f"port {settings.port} on {settings.host} cannot be used ({error.strerror}); "
                f"choose another {setting} with --{setting} or VERITUNE_{setting.upper()}"
            ) from None


@contextlib.contextmanager
def _lock_home(settings: Settings) -> Iterator[None]:
    """Lock the home directory: it belongs to one deployment at a time."""
    with (settings.home_path / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(
                f"veritune is up already with {settings.home_path}; stop it, "
                "or choose another directory with --home or VERITUNE_HOME"
            ) from None
        lock.write(str(os.getpid()))
        lock.flush()
        yield


_print_lock = threading.Lock()


def _print_line(process: str, line: str, out: IO[str] = sys.stdout) -> None:
    name = f"{process:>9}"
    if out.isatty():
        name = f"\x1b[{COLOURS.get(process, 0)}m{name}\x1b[0m"
    with _print_lock:
        print(f"{name} │ {line}", file=out, flush=True)
