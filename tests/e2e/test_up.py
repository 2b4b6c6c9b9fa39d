"""`veritune up` as an operator sees it: what it refuses, and that nothing of it stays behind."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import MODEL_CACHE, ROOT
from tests.e2e.conftest import BASE, start

pytestmark = pytest.mark.slow


def run(home: Path, *words: str, module: str = "app.cli", **environment: str) -> "subprocess.CompletedProcess[str]":
    own = {"VERITUNE_HOME": str(home), "VERITUNE_CACHE": str(MODEL_CACHE), "VERITUNE_DEFAULT_BASE_MODEL": BASE}
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(
        command, env=os.environ | own | environment, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )


def test_off_loopback_it_asks_for_a_key(tmp_path: Path) -> None:
    refused = run(tmp_path, "up", VERITUNE_HOST="0.0.0.0")
    assert refused.returncode == 1
    assert "VERITUNE_API_KEY" in refused.stderr


@pytest.mark.parametrize("module", ["app.cli", "worker", "worker.inference"])
def test_a_refused_setting_is_reported_in_one_line(tmp_path: Path, module: str) -> None:
    refused = run(tmp_path, "up", module=module, VERITUNE_INFERENCE_MAX_BATCH="0")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("veritune: VERITUNE_INFERENCE_MAX_BATCH: ")


def test_a_database_that_is_away_ends_it_in_one_line(tmp_path: Path) -> None:
    refused = run(tmp_path, "up", VERITUNE_DATABASE_URL="postgresql://someone:a-password@127.0.0.1:1/none")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "Connection refused" in refused.stderr
    assert "a-password" not in refused.stdout + refused.stderr


@pytest.mark.parametrize("words", [("up",), ("migrate",), ("models", "list")])
def test_a_file_that_is_no_database_ends_any_command_in_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "veritune.db").write_bytes(b"no database at all " * 100)
    refused = run(tmp_path, *words, VERITUNE_REDIS_URL="redis://127.0.0.1:1")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "file is not a database" in refused.stderr


def test_a_home_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = run(tmp_path / "file" / "home", "up")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert f"{tmp_path / 'file'}" in refused.stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = run(tmp_path, "up", VERITUNE_PORT=str(port))
    assert refused.returncode == 1
    assert str(port) in refused.stderr
    assert "--port or VERITUNE_PORT" in refused.stderr


def test_a_host_that_cannot_be_is_named(tmp_path: Path) -> None:
    refused = run(tmp_path, "up", VERITUNE_HOST="nowhere.invalid", VERITUNE_API_KEY="a key")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "nowhere.invalid" in refused.stderr
    assert "--host or VERITUNE_HOST" in refused.stderr


def test_options_go_before_the_environment(tmp_path: Path) -> None:
    """As on every server. What is refused shows which of them counted."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        options = ("--port", port, "--host", "localhost", "--home", str(tmp_path / "chosen"))
        refused = run(tmp_path / "other", "up", *options, VERITUNE_PORT="1", VERITUNE_HOST="127.0.0.1")
    assert f"port {port} on localhost cannot be used" in refused.stderr
    assert (tmp_path / "chosen" / "up.lock").exists()
    assert not (tmp_path / "other").exists()


def test_a_port_that_is_none_and_a_host_without_a_key_are_refused(tmp_path: Path) -> None:
    assert "--port" in run(tmp_path, "up", "--port", "70000").stderr
    assert "VERITUNE_API_KEY" in run(tmp_path, "up", "--host", "0.0.0.0").stderr


def test_the_port_of_an_address_of_version_6_is_looked_at(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert (
            f"port {port} on ::1 cannot be used (Address already in use)"
            in run(tmp_path, "up", "--port", port, "--host", "::1").stderr
        )


def test_the_home_of_a_command_is_an_option_too(tmp_path: Path) -> None:
    done = run(tmp_path / "other", "models", "list", "--home", str(tmp_path / "chosen"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "chosen" / "veritune.db").exists()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_everything_and_a_second_up_is_refused(tmp_path: Path, number: signal.Signals) -> None:
    running = start(tmp_path / "home")
    family = running.processes()
    assert len(family) >= 6
    second = run(tmp_path / "home", "up")
    assert second.returncode == 1
    assert "is up already" in second.stderr

    running.process.send_signal(number)

    assert running.process.wait(90) == 0
    running.client.close()
    _gone, left = psutil.wait_procs(family, timeout=5)
    assert left == []
