"""What the tests of commands share: a real server with a runner beside it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from app.composition import Services
from tests.api.conftest import listening
from worker.supervisor import Supervisor


@contextmanager
def listening_with_runner(services: Services) -> Iterator[httpx.Client]:
    """A client of a server whose runner takes jobs as they come."""
    over, runner = threading.Event(), Supervisor(services, "runner-1", ("cpu",))

    def work() -> None:
        while not over.wait(0.1):
            runner.work()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with listening(services) as client:
            yield client
    finally:
        over.set()
        runner.leave()
        thread.join(60)
    assert not thread.is_alive()
