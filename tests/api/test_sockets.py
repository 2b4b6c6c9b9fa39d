"""Tests over a real socket: truncated requests, wrong lengths, slow clients, live streams."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from app.composition import Services, compose
from app.domain.predictions import PredictRequest
from app.generation import GenerationRequest, ScriptedGenerator
from app.services.predictions import BATCH_THREADS
from tests.api.conftest import (
    RHINE,
    lease,
    listening,
    nothing_left,
    post_file,
    problem,
    reads_the_page,
    traces,
)
from tests.conftest import corpus_jsonl, dataset_jsonl
from tests.waiting import until

SSE = {"Accept": "text/event-stream"}
PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
END = b"\r\n--x--\r\n"
FORM = "multipart/form-data; boundary=x"
CALLS = 7
"""Calls of the model for a claim: two Thoughts, two actions, an argument, the verdict, its probabilities."""


def head(route: str, kind: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {route} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {kind}", *lines, "", ""]).encode()


def raw(client: httpx.Client) -> socket.socket:
    sock = socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=20)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def answer(sock: socket.socket) -> bytes:
    """Read the server's first response."""
    response = b""
    while part := sock.recv(1 << 16):
        response += part
        headers, found, body = response.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", headers.lower())
        if found and length and len(body) >= int(length.group(1)):
            break
    return response


@pytest.mark.parametrize("route", ["/datasets", "/corpora"])
@pytest.mark.parametrize("size", [100, 3 << 20])
def test_an_upload_cut_off_half_way(server: httpx.Client, served: Services, route: str, size: int) -> None:
    with nothing_left(served):
        with raw(server) as sock:
            body = PART + b'{"claim": "' + b"a" * size
            sock.sendall(head(route, FORM, f"Content-Length: {2 * len(body)}") + body)
        assert server.get("/health/live").status_code == 200
        time.sleep(0.2)
    assert server.get(route).json()["data"] == []


def test_a_chunked_upload_cut_off_half_way(server: httpx.Client, served: Services) -> None:
    with nothing_left(served):
        with raw(server) as sock:
            part = PART + dataset_jsonl() + END
            sock.sendall(head("/datasets", FORM, "Transfer-Encoding: chunked") + b"%x\r\n%b\r\n" % (len(part), part))
        assert server.get("/health/live").status_code == 200
        time.sleep(0.2)


def test_a_spec_cut_off_half_way_makes_no_job(server: httpx.Client, served: Services) -> None:
    post_file(server, "/datasets", dataset_jsonl(), name="rows")
    with nothing_left(served):
        with raw(server) as sock:
            spec = b'{"dataset": "rows"}'
            sock.sendall(head("/jobs", "application/json", f"Content-Length: {len(spec) + 5}") + spec)
        assert server.get("/jobs").json()["data"] == []


@pytest.mark.filterwarnings("ignore:Exception ignored in.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning")
def test_a_length_that_is_too_short(server: httpx.Client, served: Services) -> None:
    """The file is truncated. The parser does not close it, which is why the ResourceWarning is filtered."""
    with nothing_left(served), raw(server) as sock:
        body = PART + dataset_jsonl() + END
        sock.sendall(head("/datasets", FORM, f"Content-Length: {len(body) - 50}") + body)
        response = answer(sock)
        assert response.startswith(b"HTTP/1.1 422")
        assert b"urn:veritune:problem:" in response


@pytest.mark.parametrize("length", ["-1", "abc", "1, 2", "99999999999999999999999", "\u00b2"])
def test_a_length_that_is_none(server: httpx.Client, served: Services, length: str) -> None:
    with nothing_left(served), raw(server) as sock:
        sock.sendall(head("/jobs", "application/json").replace(b"\r\n\r\n", b"\r\n") + b"Content-Length: ")
        sock.sendall(length.encode("latin-1") + b"\r\n\r\n{}")
        assert answer(sock).startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))
    assert server.get("/health/live").status_code == 200


def test_a_request_that_is_no_http(server: httpx.Client) -> None:
    """uvicorn's HTTP parser refuses it before the application runs, so the response is no problem document."""
    with raw(server) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
        response = answer(sock)
        assert response.startswith(b"HTTP/1.1 400")
        assert b"<" not in response


def test_a_request_without_a_host(server: httpx.Client) -> None:
    with raw(server) as sock:
        sock.sendall(b"GET /jobs HTTP/1.0\r\n\r\n")
        response = answer(sock)
        assert response.startswith(b"HTTP/1.1 400")
        assert b"wrong_host" in response


def pieces(size: int, piece: bytes = b"a" * 65_536) -> Iterator[bytes]:
    for _ in range(size // len(piece)):
        yield piece


def test_a_chunked_json_body_over_the_limit(server: httpx.Client) -> None:
    response = server.post("/predict", content=pieces(2 << 20), headers={"Content-Type": "application/json"})
    problem(response, 413, "too_large")


@pytest.fixture
def narrow(served: Services) -> Iterator[tuple[httpx.Client, Services]]:
    """A server with an upload limit of 1 MiB and one prediction slot."""
    settings = served.settings.model_copy(update={"max_upload_bytes": 1 << 20, "prediction_slots": 1})
    with listening(compose(settings, generator=served.generator)) as client:
        yield client, served


def test_a_chunked_upload_over_the_limit(narrow: tuple[httpx.Client, Services]) -> None:
    client, served = narrow
    with nothing_left(served):

        def body() -> Iterator[bytes]:
            yield PART
            yield from pieces(2 << 20)

        problem(client.post("/datasets", content=body(), headers={"Content-Type": FORM}), 413, "too_large")


def test_an_announced_upload_over_the_limit_is_refused_before_it_is_sent(narrow: tuple[httpx.Client, Services]) -> None:
    client, served = narrow
    with nothing_left(served), raw(client) as sock:
        sock.sendall(head("/datasets", FORM, "Content-Length: 2000000", "Expect: 100-continue"))
        response = answer(sock)
        assert response.startswith(b"HTTP/1.1 413")
        assert b"application/problem+json" in response


def test_a_slow_client_delays_no_other(server: httpx.Client, served: Services) -> None:
    body = PART + dataset_jsonl() + END
    with raw(server) as sock:
        sock.sendall(head("/datasets", FORM, f"Content-Length: {len(body)}"))
        for start in range(0, len(body), 200):
            sock.sendall(body[start : start + 200])
            assert server.get("/health/live").status_code == 200
        assert answer(sock).startswith(b"HTTP/1.1 201")
    assert traces(served)["datasets"] == 1


# Streams.


class EventReader(threading.Thread):
    """Reads a job's event stream until it ends, or disconnects after `most` events."""

    def __init__(self, client: httpx.Client, job: str, last: int | None = None, most: int | None = None) -> None:
        super().__init__()
        self.received: list[int] = []
        self._url, self._most = f"{client.base_url}/jobs/{job}/events", most
        self._headers = SSE if last is None else SSE | {"Last-Event-ID": str(last)}
        self.start()

    def run(self) -> None:
        with httpx.stream("GET", self._url, headers=self._headers, timeout=20, trust_env=False) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.received.append(json.loads(line.removeprefix("data: "))["seq"])
                    if len(self.received) == self._most:
                        return

    def finish(self) -> list[int]:
        self.join(20)
        assert not self.is_alive()
        return self.received


def test_events_are_streamed_as_they_happen_and_a_client_may_resume(server: httpx.Client, served: Services) -> None:
    post_file(server, "/datasets", dataset_jsonl(), name="rows")
    job = server.post("/jobs", json={"dataset": "rows"}).json()["id"]
    whole = EventReader(server, job)
    until(lambda: whole.received == [1])
    leased = lease(served)
    until(lambda: whole.received == [1, 2])
    cut = EventReader(server, job, most=5)
    for number in range(10):
        served.attempts.add_event(leased, "note", f"number {number}")
        time.sleep(0.02)
    assert cut.finish() == [1, 2, 3, 4, 5]
    resumed = EventReader(server, job, last=5)
    for number in range(10):
        served.attempts.add_event(leased, "note", f"number {number}")
    server.post(f"/jobs/{job}/cancel")
    served.attempts.release(leased, "stopped", strike=False)
    everything = list(range(1, 25))
    assert whole.finish() == everything
    assert cut.received + resumed.finish() == everything


def test_many_clients_get_the_same_events(server: httpx.Client, served: Services) -> None:
    post_file(server, "/datasets", dataset_jsonl(), name="rows")
    job = server.post("/jobs", json={"dataset": "rows"}).json()["id"]
    readers = [EventReader(server, job) for _ in range(20)]
    until(lambda: all(reader.received for reader in readers))
    started = time.monotonic()
    server.get("/health/live")
    assert time.monotonic() - started < 2
    server.post(f"/jobs/{job}/cancel")
    assert all(reader.finish() == [1, 2] for reader in readers)


@pytest.fixture
def gated(served: Services) -> Iterator[tuple[httpx.Client, Services, threading.Event]]:
    """A server with one prediction slot. Its model waits for an event before its second Thought."""
    gate = threading.Event()

    def script(prompt: str, request: GenerationRequest) -> str:
        if prompt.endswith("Thought 2:"):
            gate.wait(20)
        return reads_the_page(prompt, request)

    tokens = served.base_models.tokenization(served.base_models.get(None))
    settings = served.settings.model_copy(update={"prediction_slots": 1})
    composed = compose(settings, generator=ScriptedGenerator(tokens, script))
    with listening(composed) as client:
        yield client, composed, gate
        gate.set()


def test_a_client_that_disconnects_releases_its_slot(gated: tuple[httpx.Client, Services, threading.Event]) -> None:
    client, composed, gate = gated
    post_file(client, "/corpora", corpus_jsonl(), "pages.jsonl")
    with client.stream("POST", "/predict", json={"claim": RHINE, "stream": True}) as response:
        assert next(response.iter_lines()) == "event: thought"
        problem(client.post("/predict", json={"claim": RHINE}), 429, "predictions_busy")
    gate.set()

    def free() -> bool:
        return client.post("/predict", json={"claim": RHINE}).status_code == 200

    until(free)
    assert composed.predictions.predict(PredictRequest(claim=RHINE)).verdict == "SUPPORTS"


def hang_up(client: httpx.Client, route: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
    """Send a request, disconnect before the response, and wait until the server has noticed."""
    with pytest.raises(httpx.ReadTimeout):
        client.post(route, json=body, headers=headers, timeout=1)
    for _ in range(3):
        client.get("/health/live")


@pytest.mark.parametrize("route", ["/predict", "/predict/batch"])
def test_no_model_call_follows_for_a_client_that_disconnected(
    gated: tuple[httpx.Client, Services, threading.Event], route: str
) -> None:
    client, composed, gate = gated
    post_file(client, "/corpora", corpus_jsonl(), "pages.jsonl")
    assert isinstance(composed.generator, ScriptedGenerator)
    asked = composed.generator.requests
    one = {"claim": RHINE}
    hang_up(client, route, one if route == "/predict" else {"requests": [one] * (BATCH_THREADS + 4)})
    most = len(asked)
    problem(client.post("/predict", json=one), 429, "predictions_busy")
    gate.set()
    until(lambda: client.post("/predict", json=one).status_code == 200)
    assert len(asked) <= most + CALLS


def test_a_claim_with_an_idempotency_key_is_judged_to_its_end_after_a_disconnect(
    gated: tuple[httpx.Client, Services, threading.Event],
) -> None:
    client, composed, gate = gated
    post_file(client, "/corpora", corpus_jsonl(), "pages.jsonl")
    assert isinstance(composed.generator, ScriptedGenerator)
    body, key = {"claim": RHINE}, {"Idempotency-Key": "one"}
    hang_up(client, "/predict", body, key)
    gate.set()
    until(lambda: client.post("/predict", json=body, headers=key).status_code == 200)
    assert len(composed.generator.requests) == CALLS


def test_the_server_answers_while_predictions_wait(gated: tuple[httpx.Client, Services, threading.Event]) -> None:
    client, _composed, gate = gated
    post_file(client, "/corpora", corpus_jsonl(), "pages.jsonl")
    answers: list[Any] = []
    ask: Callable[[], None] = lambda: answers.append(client.post("/predict", json={"claim": RHINE}))  # noqa: E731
    thread = threading.Thread(target=ask)
    thread.start()
    for path in ("/health/live", "/jobs", "/corpora", "/docs"):
        assert client.get(path).status_code == 200
    gate.set()
    thread.join(20)
    assert answers[0].status_code == 200
