"""Server and engine processes: full queues, killed engines, disconnected clients. No engine outlives its server."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from tests.inference.conftest import ENGINE, Server, TinyModels, serving
from tests.waiting import until
from worker.inference.sampling_params import ServedModel
from worker.inference.server.completion_service import ServerSettings
from worker.inference.server.engine_client import MISSED_HEARTBEATS
from worker.inference.server.model_resolver import StaticResolver

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(tiny: TinyModels) -> Iterator[Server]:
    """A server with a secret. It takes two requests at a time."""
    settings = ServerSettings(engine=ENGINE, max_in_flight=2, secret=SecretStr("s3cret"))
    with serving(tiny.by_digest(), settings) as running:
        running.client.headers["Authorization"] = "Bearer s3cret"
        yield running


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[int]:
    """Stop the engine with SIGSTOP while the block runs. Yields its process id."""
    pid = server.service.engine.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ask_in_background(server: Server, pool: ThreadPoolExecutor, count: int) -> list[Future[httpx.Response]]:
    """Requests that are in flight when this returns."""
    before = server.service.engine.in_flight
    futures = [pool.submit(server.ask, prompt=[9, 9 + i], max_tokens=20) for i in range(count)]
    until(lambda: server.service.engine.in_flight == before + count)
    return futures


def test_requests_before_the_engine_is_ready_get_retry_after(small: Server) -> None:
    early = [small.client.get("/health"), small.ask()]

    assert [response.status_code for response in early] == [503, 503]
    assert all(int(response.headers["Retry-After"]) >= 1 for response in early)
    assert early[1].json()["error"]["type"] == "ServiceUnavailableError"
    small.wait_until_ready()


def test_the_secret_is_required_by_the_api_only(small: Server) -> None:
    small.wait_until_ready()
    for header in ("Bearer wrong", "s3cret", ""):
        assert small.client.get("/v1/models", headers={"Authorization": header}).status_code == 401
        assert small.client.post("/v1/completions", headers={"Authorization": header}).status_code == 401

    assert small.client.get("/v1/models").status_code == 200
    assert httpx.get(f"{small.client.base_url}/health").status_code == 200


def test_a_full_queue_is_a_429_with_retry_after(small: Server) -> None:
    small.wait_until_ready()
    with ThreadPoolExecutor(2) as pool, stopped(small):
        waiting = ask_in_background(small, pool, 2)

        refused = small.ask()

        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "RateLimitError"
        os.kill(small.service.engine.pid, signal.SIGCONT)
        assert [future.result().status_code for future in waiting] == [200, 200]
    assert small.ask().status_code == 200


class SlowResolver(StaticResolver):
    """Takes 0.2 s for each lookup."""

    def resolve(self, digest: str) -> ServedModel:
        time.sleep(0.2)
        return super().resolve(digest)


def test_requests_that_wait_for_a_lookup_count_as_in_flight(tiny: TinyModels) -> None:
    settings = ServerSettings(engine=ENGINE, max_in_flight=4)
    with serving(tiny.by_digest(), settings, resolver=SlowResolver) as running, ThreadPoolExecutor(12) as pool:
        running.wait_until_ready()
        asked = [pool.submit(running.ask, max_tokens=500, ignore_eos=True) for _ in range(12)]
        answers = [future.result().status_code for future in asked]

    assert sorted(answers) == [200] * 3 + [429] * 9  # the fourth one is reserved for another model


def test_a_killed_engine_fails_its_requests_and_is_restarted(small: Server) -> None:
    small.wait_until_ready()
    before = small.ids(model="one")
    with ThreadPoolExecutor(2) as pool, stopped(small) as pid:
        waiting = ask_in_background(small, pool, 2)
        os.kill(pid, signal.SIGKILL)
        answers = [future.result() for future in waiting]

    assert [answer.status_code for answer in answers] == [503, 503]
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers)
    small.wait_until_ready()
    assert small.service.engine.pid != pid
    assert small.ids(model="one") == before


def test_a_stuck_engine_fails_its_requests_and_is_replaced(tiny: TinyModels) -> None:
    quick = ServerSettings(engine=ENGINE.model_copy(update={"heartbeat": 0.3}))
    with serving(tiny.by_digest(), quick) as running:
        running.wait_until_ready()
        pid = running.service.engine.pid
        time.sleep(2 * 0.3 * MISSED_HEARTBEATS)
        assert running.service.engine.pid == pid, "an idle engine is not stuck"
        with ThreadPoolExecutor(2) as pool, stopped(running):
            answers = [future.result() for future in ask_in_background(running, pool, 2)]

        assert [answer.status_code for answer in answers] == [503, 503]
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers)
        running.wait_until_ready()
        assert running.service.engine.pid != pid
        assert running.ids(model="one")


def test_an_engine_that_is_not_ready_in_time_is_replaced() -> None:
    with serving({}, ServerSettings(engine=ENGINE, start_limit=0.3)) as running:
        until(lambda: running.service.engine.starts >= 2)

        answer = running.client.get("/health")
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1


LONG: dict[str, Any] = {"model": "base", "prompt": [5, 6], "max_tokens": 500, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_before_the_response_frees_its_row(small: Server, stream: bool) -> None:
    small.wait_until_ready()
    (before,) = small.stable_metrics("vllm:generation_tokens_total")

    with stopped(small):
        with pytest.raises(httpx.ReadTimeout):
            small.client.post("/v1/completions", json={**LONG, "stream": stream}, timeout=0.5)
        until(lambda: small.service.engine.in_flight == 0, seconds=20)  # while the engine sends nothing

    (after,) = small.stable_metrics("vllm:generation_tokens_total")
    assert small.metric("vllm:num_requests_running") == 0
    assert after - before < 400  # of the 500 that were asked for


def test_a_client_that_disconnects_in_the_middle_of_a_stream_frees_its_row(small: Server) -> None:
    small.wait_until_ready()
    (before,) = small.stable_metrics("vllm:generation_tokens_total")

    with small.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()  # kept: an iterator that is dropped closes the connection
        next(lines)
        with stopped(small):
            assert small.service.engine.in_flight == 1
            response.close()
            until(lambda: small.service.engine.in_flight == 0, seconds=20)

    (after,) = small.stable_metrics("vllm:generation_tokens_total")
    assert small.metric("vllm:num_requests_running") == 0
    assert after - before < 400


def test_the_engine_ends_when_its_server_is_killed() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", SERVER_SCRIPT, str(port)], cwd=ROOT)
    try:
        engine = engine_of(server.pid, port)
        server.kill()
        server.wait()
        assert_ends(engine)
    finally:
        server.kill()
        server.wait()


def test_the_engine_ends_with_the_server(tiny: TinyModels) -> None:
    with serving(tiny.by_digest(), ServerSettings(engine=ENGINE)) as running:
        until(lambda: running.service.engine.pid is not None)
        engine = running.service.engine.pid

    assert not alive(engine)


SERVER_SCRIPT = """
import sys, uvicorn
from worker.inference.server.model_resolver import StaticResolver
from worker.inference.server.app import create_inference_app
uvicorn.run(create_inference_app(StaticResolver({})), port=int(sys.argv[1]), log_level="warning")
"""


def engine_of(server: int, port: int) -> int:
    """The engine's process id, once it is ready."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
                return int(children[0])
        time.sleep(0.1)
    raise AssertionError("the engine was not ready in time")


def assert_ends(pid: int) -> None:
    """Fail unless the process ends within seconds."""
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline, f"engine {pid} outlived its server"
        time.sleep(0.05)
