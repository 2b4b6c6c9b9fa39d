"""More requests than there is room for, and an engine that dies among many: everybody gets an answer of use."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.inference.conftest import ENGINE, Server, Shelf, serving
from tests.inference.test_engine_client import stopped
from tests.waiting import until
from worker.inference.server.completion_service import ServerSettings

CROWD, FEW = 470, 30


@pytest.fixture(scope="module")
def server(shelf: Shelf) -> Iterator[Server]:
    """With the queue that a deployment has."""
    with serving(shelf.table(), ServerSettings(engine=ENGINE)) as running:
        running.wait_until_ready()
        yield running


def test_500_at_once_are_answered_or_told_when_to_come_back(server: Server) -> None:
    pid = server.front.engine.pid
    ended: dict[str, list[float]] = {"one": [], "two": []}

    def ask(number: int) -> httpx.Response:
        model = "one" if number < CROWD else "two"
        answer = server.ask(model=model, prompt=[5 + number % 300, 9], max_tokens=32, ignore_eos=True)
        if answer.status_code == 200:
            ended[model].append(time.monotonic())
        return answer

    with ThreadPoolExecutor(CROWD + FEW) as pool:
        with stopped(server):  # until the last ones have connected, too
            futures = [pool.submit(ask, number) for number in range(CROWD + FEW)]
            until(lambda: server.front.engine.in_flight == 192 + FEW)
        answers = [future.result() for future in futures]

    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) <= {200, 429}, counts
    assert counts[200] >= 192
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers if answer.status_code == 429)
    few = Counter(answer.status_code for answer in answers[CROWD:])
    assert few[200] == FEW, "a crowd at one adapter kept another's out"
    assert sorted(ended["two"])[FEW // 2] < sorted(ended["one"])[-1], "and they did not wait for all of it"
    assert server.front.engine.pid == pid
    assert server.front.engine.in_flight == 0
    assert server.ask(model="two").status_code == 200


def test_an_engine_that_dies_among_sixteen_comes_back_with_its_adapters(server: Server) -> None:
    asked = [(("base", "one", "two")[n % 3], [7 + n, 11]) for n in range(16)]
    wanted = [server.ids(model=model, prompt=prompt, max_tokens=6, ignore_eos=True) for model, prompt in asked]

    def ask(one: tuple[str, list[int]]) -> httpx.Response:
        return server.ask(model=one[0], prompt=one[1], max_tokens=500, ignore_eos=True)

    with ThreadPoolExecutor(16) as pool:
        with stopped(server):  # or the first would be done before the last has come, where the machine is busy
            futures = [pool.submit(ask, one) for one in asked]
            until(lambda: server.front.engine.in_flight == 16)
        time.sleep(0.1)  # so that they are being answered; 500 tokens take longer
        os.kill(server.front.engine.pid, signal.SIGKILL)
        answers = [future.result() for future in futures]

    refused = [answer for answer in answers if answer.status_code != 200]  # on a slow machine some are done before
    assert {answer.status_code for answer in refused} == {503}
    assert len(refused) > 8
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    server.wait_until_ready()
    assert [server.ids(model=m, prompt=p, max_tokens=6, ignore_eos=True) for m, p in asked] == wanted
