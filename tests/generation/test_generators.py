"""Both generators follow the same contract: the client of a real inference server, and the scripted one.

What takes `asked` and `connect` alone asks for no more than the protocol: `tests/vllm` runs it against vLLM too.
"""

import math
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from threading import Barrier, Thread
from typing import ClassVar, Protocol

import httpx
import pytest
import uvicorn
from pydantic import SecretStr

from app.domain.encoding import Tokenization
from app.domain.errors import InvalidError, NotFoundError, UnavailableError
from app.domain.ledger import Unavailable
from app.generation import CompletionsGenerator, GenerationRequest, Generator, ScriptedGenerator, completions
from app.generation.transport import ExclusiveTransport
from app.tokenizers import load_tokenization
from tests.inference.conftest import ENGINE, Server, TinyModels, serving
from tests.inference.conftest import tiny as tiny
from tests.waiting import until
from worker.inference.server.completion_service import ServerSettings
from worker.inference.server.device_reservation import FixedReservation

SECRET = SecretStr("between processes")
Asked = Callable[..., GenerationRequest]


class Connect(Protocol):
    """Makes clients of a real server that requires a secret. By default they have the right one."""

    def __call__(self, secret: SecretStr | None = None) -> CompletionsGenerator: ...


@pytest.fixture(scope="module")
def tokens(tiny: TinyModels) -> Tokenization:
    return load_tokenization((tiny.base / "tokenizer.json").read_bytes(), bos_id=0, eos_id=1)


@pytest.fixture(scope="module")
def model() -> str:
    """The digest of a served base."""
    return "base"


@pytest.fixture(scope="module")
def guarded(tiny: TinyModels) -> Iterator[Server]:
    with serving(tiny.by_digest(), ServerSettings(engine=ENGINE, secret=SECRET)) as server:
        server.wait_until_ready()
        yield server


@contextmanager
def connecting(url: str, right: SecretStr) -> Iterator[Connect]:
    """Clients of the server at `url`, closed at the end."""
    with ExitStack() as stack:

        def connect(secret: SecretStr | None = None) -> CompletionsGenerator:
            return stack.enter_context(closing(CompletionsGenerator(url, secret or right)))

        yield connect


@pytest.fixture
def connect(guarded: Server) -> Iterator[Connect]:
    with connecting(str(guarded.client.base_url), SECRET) as made:
        yield made


@pytest.fixture(params=["completions", "scripted"])
def generator(request: pytest.FixtureRequest, tokens: Tokenization) -> Generator:
    if request.param == "scripted":
        return ScriptedGenerator(tokens, lambda _prompt, _request: "The river flows into the sea, it says.")
    made: Generator = request.getfixturevalue("connect")()
    return made


@pytest.fixture
def asked(tokens: Tokenization, model: str) -> Asked:
    """Makes requests for the served base: by default twelve greedy tokens after the same prompt."""
    usual = {"model": model, "prompt": tokens.encode("Thought 1: I need to search"), "max_tokens": 12}
    return lambda **more: GenerationRequest.model_validate(usual | more)


def test_the_ids_are_those_of_the_text_and_as_many_as_asked_for(
    generator: Generator, asked: Asked, tokens: Tokenization
) -> None:
    request = asked(max_tokens=5)
    answer = generator.generate(request)
    assert (len(answer.ids), answer.finish_reason) == (5, "length")
    assert answer.text == tokens.decode(answer.ids)
    assert answer.prompt_tokens == len(request.prompt)


def test_the_text_ends_before_a_stop(generator: Generator, asked: Asked, tokens: Tokenization) -> None:
    whole = generator.generate(asked()).text
    stop = whole[2:4]
    answer = generator.generate(asked(stop=(stop,)))
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert stop in tokens.decode(answer.ids)


def test_one_of_the_allowed_tokens_comes_and_all_are_weighed(
    generator: Generator, asked: Asked, tokens: Tokenization
) -> None:
    request = asked(max_tokens=1, allowed_token_ids=(70, 80, 90), logprobs=3)
    answer = generator.generate(request)
    assert set(answer.ids) <= {70, 80, 90}
    assert answer.first_logprobs.keys() == {70, 80, 90}
    assert answer.ids[0] == max(answer.first_logprobs, key=lambda token: answer.first_logprobs[token])
    assert math.isclose(sum(map(math.exp, answer.first_logprobs.values())), 1.0, abs_tol=1e-3)


def test_the_check_of_a_healthy_server_passes(generator: Generator) -> None:
    generator.check()


def test_a_regex_bounds_what_is_written(connect: Connect, asked: Asked) -> None:
    assert connect().generate(asked(regex="(yes|no)")).text in ("yes", "no")


def test_an_argument_ends_with_its_bracket(connect: Connect, asked: Asked, tokens: Tokenization) -> None:
    answer = connect().generate(asked(max_tokens=64, regex=r"[^\[\]\n]{1,20}\]"))
    assert answer.finish_reason == "stop"
    assert answer.text.index("]") == len(answer.text) - 1 <= 20
    assert answer.text == tokens.decode(answer.ids)


def test_a_seed_repeats_what_was_drawn(connect: Connect, asked: Asked) -> None:
    drawn = [connect().generate(asked(temperature=1.0, seed=seed)).ids for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_what_was_read_before_is_counted_and_changes_no_score(
    connect: Connect, asked: Asked, tokens: Tokenization
) -> None:
    read = (list(tokens.encode("Observation 1: It flows through ten countries. ")) * 40)[:400]
    scoring = asked(prompt=read, max_tokens=1, allowed_token_ids=(70, 80, 90), logprobs=3)
    first, again = (connect().generate(scoring) for _ in range(2))
    assert first.cached_tokens < again.cached_tokens < again.prompt_tokens
    assert again.first_logprobs.keys() == {70, 80, 90}
    for token, value in first.first_logprobs.items():
        assert math.isclose(value, again.first_logprobs[token], abs_tol=1e-3)


def test_logprobs_do_not_depend_on_top_p(connect: Connect, asked: Asked) -> None:
    scoring = asked(max_tokens=1, allowed_token_ids=(70, 80, 90), logprobs=3, top_p=0.5)
    answer = connect().generate(scoring)
    assert answer.first_logprobs.keys() == {70, 80, 90}
    assert math.isclose(sum(map(math.exp, answer.first_logprobs.values())), 1.0, abs_tol=1e-3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"prompt": [5] * 5_000}, "5000"),
        ({"prompt": [999_999]}, "vocabulary"),
        ({"allowed_token_ids": [999_999]}, "allowed_token_ids"),
        ({"regex": "(a"}, "unclosed"),
    ],
)
def test_an_invalid_request_is_refused_with_a_message(
    connect: Connect, asked: Asked, more: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidError, match=words) as raised:
        connect().generate(asked(**more))
    assert raised.value.code == "inference_refused"


def test_a_model_that_is_not_there(connect: Connect, asked: Asked) -> None:
    with pytest.raises(NotFoundError) as raised:
        connect().generate(asked(model="0" * 64))
    assert raised.value.code == "unknown_model"


def test_a_wrong_secret_is_not_the_users_fault(connect: Connect, asked: Asked) -> None:
    with pytest.raises(UnavailableError) as raised:
        connect(SecretStr("guess")).generate(asked())
    assert raised.value.code == "inference_secret"
    assert "guess" not in str(raised.value)


def test_a_suspended_server_says_when_it_is_back(tiny: TinyModels, asked: Asked) -> None:
    absent = FixedReservation(Unavailable("inference is suspended while a job trains (job_1)", 300.0))
    with (
        serving(tiny.by_digest(), ServerSettings(engine=ENGINE), absent) as server,
        closing(CompletionsGenerator(str(server.client.base_url))) as client,
    ):
        until(lambda: "job_1" in server.service.engine.unavailable_reason)
        with pytest.raises(UnavailableError, match="is suspended while a job trains"):
            client.check()
        with pytest.raises(UnavailableError, match="is suspended while a job trains") as raised:
            client.generate(asked())
    assert raised.value.code == "inference_away"
    assert raised.value.retry_after is not None
    assert 300 <= raised.value.retry_after <= 420


def test_a_server_that_is_away(asked: Asked) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        with closing(CompletionsGenerator(f"http://127.0.0.1:{taken.getsockname()[1]}")) as client:
            with pytest.raises(UnavailableError, match="does not answer"):
                client.check()
            with pytest.raises(UnavailableError) as raised:
                client.generate(asked())
    assert raised.value.retry_after == 2


@pytest.mark.parametrize(
    ("status", "headers", "body", "code", "after"),
    [
        (200, {}, b"{}", "inference_not_understood", None),
        (200, {}, b"<html>", "inference_not_understood", None),
        (401, {}, b'{"error": "Unauthorized"}', "inference_secret", None),
        (500, {}, b"Internal Server Error", "inference_away", 2),
        (503, {"Retry-After": "7"}, b"{}", "inference_away", 7),
        (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b"{}", "inference_away", 2),
    ],
)
def test_whatever_stands_between_is_an_outage_in_words(
    asked: Asked, status: int, headers: dict[str, str], body: bytes, code: str, after: float | None
) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        client = CompletionsGenerator(f"http://127.0.0.1:{server.server_port}")
        with closing(client), pytest.raises(UnavailableError) as raised:
            client.generate(asked())
        thread.join()
    assert (raised.value.code, raised.value.retry_after) == (code, after)


class Gated(BaseHTTPRequestHandler):
    """Answers a GET once two of them are there, or at once when `alone`; counts connections opened and closed."""

    protocol_version = "HTTP/1.1"
    both = Barrier(2)
    alone = False
    opened: ClassVar[list[int]] = []
    ended: ClassVar[list[int]] = []

    def setup(self) -> None:
        self.opened.append(self.client_address[1])
        super().setup()

    def finish(self) -> None:
        self.ended.append(self.client_address[1])
        super().finish()

    def do_GET(self) -> None:
        if not Gated.alone:
            self.both.wait(20)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_request_closes_no_connection_that_another_thread_may_be_using(monkeypatch: pytest.MonkeyPatch) -> None:
    """httpcore's own pool closes every connection that was idle too long, also one that it has just given away."""
    monkeypatch.setattr(completions, "IDLE_SECONDS", 0.1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Gated) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with closing(CompletionsGenerator(f"http://127.0.0.1:{server.server_port}")) as client:
            with ThreadPoolExecutor(2) as pool:
                for check in [pool.submit(client.check) for _ in range(2)]:
                    check.result()
            time.sleep(0.2)
            Gated.alone = True
            client.check()
            until(lambda: bool(Gated.ended))
            time.sleep(0.2)  # time enough to close the other, too
            assert (len(Gated.opened), len(Gated.ended)) == (3, 1)
        server.shutdown()


def test_no_question_is_sent_over_a_connection_that_the_server_may_be_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        connections: ClassVar[list[int]] = []

        def setup(self) -> None:
            self.connections.append(1)
            super().setup()

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    assert uvicorn.Config("").timeout_keep_alive > 2 * completions.IDLE_SECONDS
    monkeypatch.setattr(completions, "IDLE_SECONDS", 0.1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with closing(CompletionsGenerator(f"http://127.0.0.1:{server.server_port}")) as client:
            client.check()
            client.check()
            assert len(Server.connections) == 1
            time.sleep(0.2)
            client.check()
        server.shutdown()
    assert len(Server.connections) == 2


def test_a_request_on_a_connection_that_the_server_just_closed_is_sent_once_more() -> None:
    """The server answers one request a connection and closes it when the next one arrives, without a response."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    arrived = list[bytes]()

    def serve(listener: socket.socket) -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                arrived.append(connection.recv(1 << 16))
                connection.sendall(answer)
                arrived.append(connection.recv(1 << 16))  # the next request, or b"" once the client closes

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        server = Thread(target=serve, args=(listener,))
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        with httpx.Client(transport=ExclusiveTransport(connections=1, idle_seconds=2)) as client:
            assert [client.get(url).text for _ in range(2)] == ["ok", "ok"]
        server.join()
    assert [len(request) > 0 for request in arrived] == [True, True, True, False]
