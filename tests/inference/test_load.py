"""More requests than the queue takes, and an engine that is killed under load: each gets a completion, 429 or 503."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.inference.conftest import ENGINE, Server, TinyModels, serving
from tests.inference.test_engine_client import stopped
from tests.waiting import until
from worker.inference.server.completion_service import ServerSettings

MANY, FEW = 470, 30


@pytest.fixture(scope="module")
def server(tiny: TinyModels) -> Iterator[Server]:
    """A server with the default queue."""
    with serving(tiny.by_digest(), ServerSettings(engine=ENGINE)) as running:
        running.wait_until_ready()
        yield running


def test_500_requests_at_once_get_a_completion_or_retry_after(server: Server) -> None:
    pid = server.service.engine.pid
    ended: dict[str, list[float]] = {"one": [], "two": []}

    def ask(number: int) -> httpx.Response:
        model = "one" if number < MANY else "two"
        answer = server.ask(model=model, prompt=[5 + number % 300, 9], max_tokens=32, ignore_eos=True)
        if answer.status_code == 200:
            ended[model].append(time.monotonic())
        return answer

    with ThreadPoolExecutor(MANY + FEW) as pool:
        with stopped(server):  # until the last clients have connected, too
            futures = [pool.submit(ask, number) for number in range(MANY + FEW)]
            until(lambda: server.service.engine.in_flight == 192 + FEW)
        answers = [future.result() for future in futures]

    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) <= {200, 429}, counts
    assert counts[200] >= 192
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers if answer.status_code == 429)
    few = Counter(answer.status_code for answer in answers[MANY:])
    assert few[200] == FEW, "many requests for one adapter starved another's"
    assert sorted(ended["two"])[FEW // 2] < sorted(ended["one"])[-1], "and they did not wait for all of it"
    assert server.service.engine.pid == pid
    assert server.service.engine.in_flight == 0
    assert server.ask(model="two").status_code == 200


def test_an_engine_killed_under_sixteen_requests_restarts_with_its_adapters(server: Server) -> None:
    asked = [(("base", "one", "two")[n % 3], [7 + n, 11]) for n in range(16)]
    wanted = [server.ids(model=model, prompt=prompt, max_tokens=6, ignore_eos=True) for model, prompt in asked]

    def ask(one: tuple[str, list[int]]) -> httpx.Response:
        return server.ask(model=one[0], prompt=one[1], max_tokens=500, ignore_eos=True)

    with ThreadPoolExecutor(16) as pool:
        with stopped(server):  # or, on a busy machine, the first would finish before the last arrives
            futures = [pool.submit(ask, one) for one in asked]
            until(lambda: server.service.engine.in_flight == 16)
        time.sleep(0.1)  # so that they are running; 500 tokens take longer
        os.kill(server.service.engine.pid, signal.SIGKILL)
        answers = [future.result() for future in futures]

    refused = [answer for answer in answers if answer.status_code != 200]  # on a slow machine some have finished
    assert {answer.status_code for answer in refused} == {503}
    assert len(refused) > 8
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    server.wait_until_ready()
    assert [server.ids(model=m, prompt=p, max_tokens=6, ignore_eos=True) for m, p in asked] == wanted
