"""The engine is suspended while a job trains, and resumed afterwards. Requests meanwhile get 503."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.domain.errors import UnavailableError
from app.domain.ledger import Unavailable
from tests.inference.conftest import ENGINE, Server, TinyModels, serving
from tests.inference.test_engine_client import alive, ask_in_background, stopped
from tests.waiting import until
from worker.inference.server.completion_service import ServerSettings
from worker.inference.server.device_reservation import DEFAULT_RETRY_AFTER, LAPSED, SUSPEND_AFTER, FixedReservation

TRAINS = Unavailable("inference is suspended while a job trains (job_1)", 1_000.0)
STARTING = 120
"""Seconds that an engine may take to start where these tests run, which `Retry-After` counts."""


@pytest.fixture(scope="module")
def reservation() -> FixedReservation:
    return FixedReservation()


@pytest.fixture(scope="module")
def running(tiny: TinyModels, reservation: FixedReservation) -> Iterator[Server]:
    with serving(tiny.by_digest(), ServerSettings(engine=ENGINE), reservation) as server:
        yield server


@pytest.fixture
def server(running: Server, reservation: FixedReservation) -> Iterator[Server]:
    """A server whose engine is ready, before the test and after it."""
    running.wait_until_ready()
    yield running
    reservation.unavailable = None
    running.wait_until_ready()


def pid_of(server: Server) -> int:
    found: int = server.service.engine.pid
    return found


def suspend(server: Server, reservation: FixedReservation, reason: Unavailable = TRAINS) -> None:
    reservation.unavailable = reason
    until(lambda: not reservation.is_held)


def test_the_engine_ends_and_the_reservation_is_released_after_it(
    server: Server, reservation: FixedReservation
) -> None:
    pid = pid_of(server)
    assert reservation.is_held
    began = time.monotonic()
    suspend(server, reservation)
    assert time.monotonic() - began < 3
    assert not alive(pid)
    assert server.service.engine.pid is None


def test_requests_meanwhile_get_the_reason_and_retry_after(server: Server, reservation: FixedReservation) -> None:
    suspend(server, reservation)
    for answer in (server.ask(), server.ask(stream=True), server.client.get("/health")):
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == TRAINS.reason
        assert 1_000 <= int(answer.headers["Retry-After"]) <= 1_000 + STARTING
    assert (server.metric("veritune:engine_suspended"), server.metric("veritune:engine_up")) == (1, 0)
    assert server.client.get("/v1/models").status_code == 200


@pytest.mark.parametrize(("seconds", "least"), [(None, DEFAULT_RETRY_AFTER), (0.0, 1)])
def test_retry_after_is_short_if_the_end_is_unknown_or_overdue(
    server: Server, reservation: FixedReservation, seconds: float | None, least: float
) -> None:
    suspend(server, reservation, Unavailable("it trains", seconds))
    assert least <= int(server.ask().headers["Retry-After"]) <= least + STARTING


def test_a_resumed_engine_gives_the_same_completions(
    server: Server, reservation: FixedReservation, caplog: pytest.LogCaptureFixture
) -> None:
    before, pid, starts = server.ids(model="one"), pid_of(server), server.metric("veritune:engine_starts")
    with caplog.at_level(logging.WARNING):
        suspend(server, reservation)
        reservation.unavailable = None
        server.wait_until_ready()
    assert server.ids(model="one") == before
    assert pid_of(server) != pid
    assert server.metric("veritune:engine_starts") == starts + 1
    assert server.metric("veritune:engine_suspended") == 0
    assert caplog.messages == []  # nothing died, and nothing waited to be started again


def test_running_requests_may_finish_and_new_ones_are_refused_at_once(
    server: Server, reservation: FixedReservation
) -> None:
    with ThreadPoolExecutor(2) as pool:
        with stopped(server):
            running = ask_in_background(server, pool, 2)
            reservation.unavailable = TRAINS
            until(lambda: server.service.engine.suspended)
            assert server.ask().status_code == 503
            assert reservation.is_held
        assert [future.result().status_code for future in running] == [200, 200]
    until(lambda: not reservation.is_held)


def test_requests_that_outlast_the_grace_period_are_refused_like_new_ones(
    server: Server, reservation: FixedReservation
) -> None:
    with ThreadPoolExecutor(2) as pool, stopped(server) as pid:
        running = ask_in_background(server, pool, 2)
        began = time.monotonic()
        suspend(server, reservation)
        assert SUSPEND_AFTER < time.monotonic() - began < SUSPEND_AFTER + 4
        answers = [future.result() for future in running]
    assert not alive(pid)
    assert [answer.json()["error"]["message"] for answer in answers] == [TRAINS.reason] * 2
    assert all(990 <= int(answer.headers["Retry-After"]) <= 1_000 + STARTING for answer in answers)


def test_an_engine_that_is_starting_ends_at_once(server: Server, reservation: FixedReservation) -> None:
    suspend(server, reservation)
    reservation.unavailable = None
    until(lambda: server.service.engine.pid is not None)
    assert reservation.is_held
    pid, began = pid_of(server), time.monotonic()
    suspend(server, reservation)
    assert time.monotonic() - began < 2
    assert not alive(pid)


def test_an_unavailable_ledger_changes_nothing_at_first(
    server: Server, reservation: FixedReservation, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, asked = pid_of(server), []

    def unavailable() -> Unavailable | None:
        asked.append(1)
        raise UnavailableError("the database does not answer")

    monkeypatch.setattr(reservation, "renew", unavailable)
    until(lambda: len(asked) > 1)
    assert server.ask().status_code == 200
    assert pid_of(server) == pid


def test_a_ledger_unavailable_for_longer_than_the_lease_ends_the_engine(
    server: Server, reservation: FixedReservation, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = pid_of(server)

    def unavailable() -> Unavailable | None:
        raise UnavailableError("the database does not answer")

    monkeypatch.setattr(reservation, "lease", 1.0)
    monkeypatch.setattr(reservation, "renew", unavailable)
    until(lambda: not alive(pid))
    assert server.ask().json()["error"]["message"] == LAPSED.reason
    monkeypatch.undo()
    server.wait_until_ready()


def test_no_engine_starts_before_it_has_a_reservation(tiny: TinyModels) -> None:
    waiting = FixedReservation(TRAINS)
    with serving(tiny.by_digest(), ServerSettings(engine=ENGINE), waiting) as server:
        until(lambda: server.service.engine.unavailable_reason == TRAINS.reason)
        assert server.service.engine.pid is None
        assert server.client.get("/health").json()["error"]["message"] == TRAINS.reason
        waiting.unavailable = None
        server.wait_until_ready()
        pid = pid_of(server)
    assert not alive(pid)
    assert not waiting.is_held
