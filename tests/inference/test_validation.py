"""Request bodies are checked before the engine gets them. The error names the first thing that is wrong."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from tests.inference.conftest import Server
from worker.inference.errors import APIError
from worker.inference.ipc import MAX_CANDIDATES, MAX_LINE, Generate, RankedToken, decode_engine_input
from worker.inference.sampling_params import MAX_ALLOWED_IDS, MAX_DEPTH, ServedModel
from worker.inference.server.protocol import CompletionRequest
from worker.inference.server.validation import check_request, parse_request
from worker.json_lines import encode_message

LONG = ServedModel(digest="long", base_digest="long", base_path="/nowhere", max_model_len=131_072)
MANY = 1_000

WRONG: dict[str, dict[str, Any]] = {
    "prompts": {"prompt": [{}] * MANY},
    "ids in prompts": {"prompt": [[{}] * MANY] * MANY},
    "one of two shapes": {"prompt": [*range(MANY), "text"] * 2},
    "stops": {"stop": [{}] * MANY},
    "stop ids": {"stop_token_ids": [{}] * MANY},
    "allowed ids": {"allowed_token_ids": [{}] * MANY},
    "choices": {"structured_outputs": {"choice": [{}] * MANY}},
    "fields": {f"field{n}": 0 for n in range(MANY)},
    "fields of a grammar": {"structured_outputs": {f"field{n}": 0 for n in range(MANY)}},
    "fields of a stream": {"stream": True, "stream_options": {f"field{n}": 0 for n in range(MANY)}},
}


def request(**body: Any) -> CompletionRequest:
    return CompletionRequest(**{"model": "long", "prompt": [5, 6], **body})


def nested(levels: int) -> dict[str, Any]:
    """A schema of so many nested objects."""
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG.keys())
def test_a_thousand_errors_are_cut_to_a_few(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        CompletionRequest.model_validate_json(json.dumps({"model": "long", "prompt": [5], **body}))

    assert raised.value.error_count() <= 4  # one for each shape that a prompt may have


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model": "a", "prompt": [5], "model": "b"}', "model"),
        (b'{"model": "a", "prompt": [5], "structured_outputs": {"regex": "a", "regex": "b"}}', "structured_outputs"),
    ],
)
def test_a_repeated_key_is_refused_with_its_name(body: bytes, param: str) -> None:
    with pytest.raises(APIError, match="is repeated") as raised:
        parse_request(body)
    assert (raised.value.status, raised.value.param) == (400, param)


def test_only_fields_that_vllm_has_may_be_null() -> None:
    body = {"model": "long", "prompt": [5], "top_k": None, "best_of": None, "seed": None}
    assert parse_request(json.dumps(body).encode()).seed is None

    with pytest.raises(APIError, match="nonsense: Extra inputs"):
        parse_request(json.dumps({**body, "nonsense": None}).encode())


def test_the_deepest_schema_fits_into_a_message() -> None:
    deep = request(structured_outputs={"json": nested(MAX_DEPTH)})
    generate = Generate(id="deep", model=LONG, prompt=[5], sampling=deep.sampling())
    assert decode_engine_input(encode_message(generate)) == generate

    with pytest.raises(ValidationError, match="more than 100 levels"):
        request(structured_outputs={"json": nested(MAX_DEPTH + 1)})


def test_a_schema_as_deep_as_a_body_allows_does_not_end_the_engine(server: Server) -> None:
    pid = server.service.engine.pid

    assert server.ask(structured_outputs={"json": nested(197)}).status_code == 400
    assert server.ask(max_tokens=1).status_code == 200
    assert server.service.engine.pid == pid


TOO_LONG: dict[str, dict[str, Any]] = {
    "a scored prompt": {"prompt": [5] * 13_000, "prompt_logprobs": 20},
    "a scored text": {"prompt": "a" * 13_000, "prompt_logprobs": 20},
    "many scored prompts": {"prompt": [[5] * 500] * 64, "prompt_logprobs": 20},
    "an answer": {"max_tokens": 13_000, "logprobs": 20},
    "both together": {"prompt": [5] * 90_000, "max_tokens": 30_000, "prompt_logprobs": 1, "logprobs": 2},
}


@pytest.mark.parametrize("body", TOO_LONG.values(), ids=TOO_LONG.keys())
def test_a_completion_too_long_for_a_message_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(APIError, match="at most 262144"):
        check_request(request(**body), LONG)


SHORT_ENOUGH: dict[str, dict[str, Any]] = {
    "the longest scored prompt": {"prompt": [5] * 131_071, "max_tokens": 1, "prompt_logprobs": 0},
    "a short scored text": {"prompt": "a claim", "prompt_logprobs": 20},
    "a long stream": {"max_tokens": 100_000, "logprobs": 20, "stream": True},
    "what the engine refuses with figures": {"prompt": [5] * 200_000, "max_tokens": 10**30, "logprobs": 0},
}


@pytest.mark.parametrize("body", SHORT_ENOUGH.values(), ids=SHORT_ENOUGH.keys())
def test_a_completion_that_fits_into_a_message_is_not_refused(body: dict[str, Any]) -> None:
    check_request(request(**body), LONG)


def test_the_most_ranked_tokens_fit_into_a_message() -> None:
    token = RankedToken(id=262_143, logprob=-12.345678901234567, text=" " * 128, rank=262_143)

    assert MAX_CANDIDATES * len(line_of(token)) < 0.9 * MAX_LINE


def line_of(token: RankedToken) -> str:
    return token.model_dump_json() + ","


def test_a_text_prompt_too_long_to_tokenize_is_refused_first(server: Server) -> None:
    refused = server.ask(prompt="a" * (64 * 512 + 1))
    assert refused.status_code == 400
    assert "32769 characters" in refused.json()["error"]["message"]
    assert "32768" in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "prompt"

    assert "maximum context length" in server.ask(prompt="a " * (32 * 512)).json()["error"]["message"]


@pytest.mark.parametrize("body", [{"stop_token_ids": [5] * 1_025}, {"allowed_token_ids": [5] * (MAX_ALLOWED_IDS + 1)}])
def test_lists_of_ids_are_bounded(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="at most"):
        request(**body)
