"""Both generators keep the same promises: the client of a real front and engine, and the script in memory."""

import math
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
from pydantic import SecretStr

from app.domain.encoding import Tokenization
from app.domain.errors import NotFoundError, UnavailableError
from app.domain.ledger import Absence
from app.generation import CompletionsGenerator, GenerationRequest, Generator, ScriptedGenerator
from app.tokenizers import load_tokenization
from tests.inference.conftest import ENGINE, Server, Shelf, serving
from tests.inference.conftest import shelf as shelf
from worker.inference.front import FrontSettings
from worker.inference.residence import FixedTenancy

SECRET = SecretStr("between processes")


@pytest.fixture(scope="module")
def tokens(shelf: Shelf) -> Tokenization:
    return load_tokenization((shelf.base / "tokenizer.json").read_bytes(), bos_id=0, eos_id=1)


@pytest.fixture(scope="module")
def guarded(shelf: Shelf) -> Iterator[Server]:
    with serving(shelf.table(), FrontSettings(engine=ENGINE, secret=SECRET)) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(params=["completions", "scripted"])
def generator(request: pytest.FixtureRequest, tokens: Tokenization) -> Iterator[Generator]:
    if request.param == "scripted":
        made: Generator = ScriptedGenerator(tokens, lambda _prompt, _request: "The river flows into the sea, it says.")
    else:
        server: Server = request.getfixturevalue("guarded")
        made = CompletionsGenerator(str(server.client.base_url), SECRET)
    with closing(made):
        yield made


def asked(tokens: Tokenization, **more: object) -> GenerationRequest:
    prompt = tokens.encode("Thought 1: I need to search")
    return GenerationRequest.model_validate({"model": "base", "prompt": prompt, "max_tokens": 12, **more})


def test_the_ids_are_those_of_the_text_and_as_many_as_asked_for(generator: Generator, tokens: Tokenization) -> None:
    request = asked(tokens, max_tokens=5)
    answer = generator.generate(request)
    assert (len(answer.ids), answer.finish_reason) == (5, "length")
    assert answer.text == tokens.decode(answer.ids)
    assert answer.prompt_tokens == len(request.prompt)


def test_the_text_ends_before_a_stop(generator: Generator, tokens: Tokenization) -> None:
    whole = generator.generate(asked(tokens)).text
    stop = whole[2:4]
    answer = generator.generate(asked(tokens, stop=(stop,)))
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert stop in tokens.decode(answer.ids)


def test_one_of_the_allowed_tokens_comes_and_all_are_weighed(generator: Generator, tokens: Tokenization) -> None:
    request = asked(tokens, max_tokens=1, allowed_token_ids=(70, 80, 90), logprobs=3)
    answer = generator.generate(request)
    assert set(answer.ids) <= {70, 80, 90}
    assert answer.first_logprobs.keys() == {70, 80, 90}
    assert answer.ids[0] == max(answer.first_logprobs, key=lambda token: answer.first_logprobs[token])
    assert math.isclose(sum(map(math.exp, answer.first_logprobs.values())), 1.0, abs_tol=1e-3)


def test_a_server_that_answers_is_healthy(generator: Generator) -> None:
    assert generator.healthy()


def test_a_regex_bounds_what_is_written(guarded: Server, tokens: Tokenization) -> None:
    with closing(CompletionsGenerator(str(guarded.client.base_url), SECRET)) as client:
        assert client.generate(asked(tokens, regex="(yes|no)")).text in ("yes", "no")


def test_a_model_that_is_not_there(guarded: Server, tokens: Tokenization) -> None:
    client = CompletionsGenerator(str(guarded.client.base_url), SECRET)
    with closing(client), pytest.raises(NotFoundError) as raised:
        client.generate(asked(tokens, model="nowhere"))
    assert raised.value.code == "unknown_model"


def test_a_wrong_secret_is_not_the_users_fault(guarded: Server, tokens: Tokenization) -> None:
    client = CompletionsGenerator(str(guarded.client.base_url), SecretStr("guess"))
    with closing(client), pytest.raises(UnavailableError) as raised:
        client.generate(asked(tokens))
    assert raised.value.code == "inference_secret"
    assert "guess" not in str(raised.value)


def test_a_server_that_makes_way_says_when_it_is_back(shelf: Shelf, tokens: Tokenization) -> None:
    absent = FixedTenancy(Absence("inference makes way for training (job_1)", 300.0))
    with (
        serving(shelf.table(), FrontSettings(engine=ENGINE), absent) as server,
        closing(CompletionsGenerator(str(server.client.base_url))) as client,
    ):
        server.wait_until(lambda: "job_1" in server.front.link.why)
        assert not client.healthy()
        with pytest.raises(UnavailableError, match="makes way for training") as raised:
            client.generate(asked(tokens))
    assert raised.value.code == "inference_away"
    assert raised.value.retry_after is not None
    assert 300 <= raised.value.retry_after <= 420


def test_a_server_that_is_away(tokens: Tokenization) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        with closing(CompletionsGenerator(f"http://127.0.0.1:{taken.getsockname()[1]}")) as client:
            assert not client.healthy()
            with pytest.raises(UnavailableError) as raised:
                client.generate(asked(tokens))
    assert raised.value.retry_after == 2
