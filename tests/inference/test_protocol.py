"""The server speaks vLLM's completions protocol, and refuses bad requests as vLLM does.

Tests with the fixture `completions` are about the protocol itself: `tests/vllm` runs them against vLLM.
"""

import json
import math
import subprocess
import sys
from typing import Any

import pytest

from tests.inference.conftest import CompletionsClient, Server


def events(text: str) -> list[str]:
    """The data of each server-sent event."""
    return [block.removeprefix("data: ") for block in text.split("\n\n") if block]


@pytest.fixture
def completions(server: Server) -> CompletionsClient:
    return server


def test_a_response_has_the_shape_of_vllms(completions: CompletionsClient) -> None:
    response = completions.ask(max_tokens=5).json()

    assert response["id"].startswith("cmpl-")
    assert response["object"] == "text_completion"
    assert response["model"] == completions.model
    (choice,) = response["choices"]
    assert choice["index"] == 0
    assert choice["prompt_token_ids"] == completions.prompt
    assert len(choice["token_ids"]) == 5
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    assert response["usage"]["prompt_tokens"] == 6
    assert response["usage"]["completion_tokens"] == 5
    assert response["usage"]["total_tokens"] == 11
    assert "cached_tokens" in response["usage"]["prompt_tokens_details"]


def test_ids_are_returned_only_on_request(completions: CompletionsClient) -> None:
    choice = completions.choice(return_token_ids=False)

    assert choice["token_ids"] is None
    assert choice["prompt_token_ids"] is None


def test_a_text_prompt_is_tokenized_by_the_engine(completions: CompletionsClient) -> None:
    choice = completions.choice(prompt="Claim: The Danube")

    again = completions.choice(prompt=choice["prompt_token_ids"])
    assert again["token_ids"] == choice["token_ids"]


def test_several_prompts_give_one_choice_each_in_order(completions: CompletionsClient) -> None:
    prompts = [[70, 90], [110, 130, 150]]

    answer = completions.ask(prompt=prompts).json()

    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == prompts
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["choices"][1]["token_ids"] == completions.ids(prompt=prompts[1])


def test_a_stream_has_the_same_completion_in_chunks(completions: CompletionsClient) -> None:
    whole = completions.choice(max_tokens=12, logprobs=1)
    response = completions.ask(max_tokens=12, logprobs=1, stream=True, stream_options={"include_usage": True})

    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response.text)
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert done == "[DONE]"
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"]["completion_tokens"] == 12
    assert len(choices) > 3
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]
    assert choices[0]["prompt_token_ids"] == completions.prompt
    assert choices[1]["prompt_token_ids"] is None
    assert [choice["finish_reason"] for choice in choices[-2:]] == [None, "length"]
    assert sum(len(choice["logprobs"]["tokens"]) for choice in choices) == 12


def test_a_stream_that_holds_back_text_has_the_same_offsets(server: Server) -> None:
    body: dict[str, Any] = {"max_tokens": 12, "logprobs": 0, "stop": "never generated"}
    whole = server.choice(**body)["logprobs"]["text_offset"]

    *chunks, _ = events(server.ask(**body, stream=True).text)

    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert len(choices) > 3
    assert [offset for choice in choices for offset in choice["logprobs"]["text_offset"]] == whole


def test_a_stream_holds_back_what_a_stop_string_may_still_cut(completions: CompletionsClient) -> None:
    text = completions.choice(max_tokens=12)["text"]
    stop = text[4:9]

    response = completions.ask(max_tokens=12, stop=stop, stream=True)

    *chunks, _ = events(response.text)
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == text[: text.index(stop)]


def test_the_probabilities_of_allowed_tokens_add_up_to_one(completions: CompletionsClient) -> None:
    choice = completions.choice(
        max_tokens=1, allowed_token_ids=[50, 60, 70], logprobs=3, return_tokens_as_token_ids=True
    )

    (top,) = choice["logprobs"]["top_logprobs"]
    assert set(top) == {"token_id:50", "token_id:60", "token_id:70"}
    assert sum(math.exp(value) for value in top.values()) == pytest.approx(1, abs=1e-5)
    (chosen,) = choice["token_ids"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{chosen}"]
    assert choice["logprobs"]["token_logprobs"] == [max(top.values())]


def test_one_token_takes_one_prefill_and_no_decode_step(server: Server) -> None:
    steps, prefills = server.stable_metrics("veritune:decode_steps_total", "veritune:prefills_total")

    server.ask(prompt=[33, 44, 55], max_tokens=1, allowed_token_ids=[50, 60, 70], logprobs=3)

    assert server.stable_metrics("veritune:decode_steps_total", "veritune:prefills_total") == [steps, prefills + 1]


def test_logprobs_follow_the_legacy_layout(completions: CompletionsClient) -> None:
    logprobs = completions.choice(max_tokens=4, logprobs=2)["logprobs"]

    assert [len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [4] * 4
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    for chosen, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert chosen == max(top.values())


def test_prompt_logprobs_have_the_shape_of_vllms(completions: CompletionsClient) -> None:
    choice = completions.choice(max_tokens=1, prompt_logprobs=2)

    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert len(others) == len(completions.prompt) - 1
    for token, position in zip(completions.prompt[1:], others, strict=True):
        own = position[str(token)]
        assert own.keys() == {"logprob", "rank", "decoded_token"}
        assert len(position) == (2 if own["rank"] <= 2 else 3)
        assert {entry["rank"] for entry in position.values()} == {1, 2, own["rank"]}
        ordered = sorted(position.values(), key=lambda entry: entry["rank"])
        assert [entry["logprob"] for entry in ordered] == sorted((e["logprob"] for e in ordered), reverse=True)


def test_prompt_logprobs_are_null_unless_asked_for(completions: CompletionsClient) -> None:
    assert completions.choice(max_tokens=1)["prompt_logprobs"] is None


def test_the_models_route_lists_requested_models(server: Server) -> None:
    server.ask(model="one")

    cards = {card["id"]: card for card in server.client.get("/v1/models").json()["data"]}
    assert cards["one"]["parent"] == "base"
    assert cards["one"]["max_model_len"] == 512


def test_metrics_have_vllms_names(server: Server) -> None:
    server.ask()

    text = server.client.get("/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "prompt_tokens_total", "prefix_cache_hits_total"):
        assert f"vllm:{name} " in text
    assert 'vllm:request_success_total{finished_reason="length"}' in text


BAD = {
    "no prompt": ({"prompt": None}, 400, "prompt"),
    "empty ids": ({"prompt": []}, 400, "empty"),
    "empty text": ({"prompt": ""}, 400, "empty"),
    "one of two empty": ({"prompt": [[1], []]}, 400, "empty"),
    "negative id": ({"prompt": [-1]}, 400, "prompt"),
    "id outside the vocabulary": ({"prompt": [400]}, 400, "399"),
    "allowed id outside": ({"allowed_token_ids": [5, 400_000]}, 400, "400000"),
    "prompt too long": ({"prompt": [5] * 600}, 400, "512"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "more minimum than maximum": ({"min_tokens": 9, "max_tokens": 3}, 400, "min_tokens"),
    "negative temperature": ({"temperature": -1}, 400, "temperature"),
    "too many logprobs": ({"logprobs": 21}, 400, "logprobs"),
    "too many prompt logprobs": ({"prompt_logprobs": 21}, 400, "prompt_logprobs"),
    "a scored stream": ({"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs"),
    "empty stop": ({"stop": ""}, 400, "stop"),
    "unknown field": ({"best_of": 2}, 400, "best_of"),
    "unknown field that is null": ({"nonsense": None}, 400, "nonsense"),
    "two completions": ({"n": 2}, 400, "n"),
    "echo": ({"echo": True}, 400, "echo"),
    "stream options alone": ({"stream_options": {"include_usage": True}}, 400, "stream"),
    "unknown model": ({"model": "nobody"}, 404, "nobody"),
    "invalid regex": ({"structured_outputs": {"regex": "(a"}}, 400, "unclosed"),
    "lookahead": ({"structured_outputs": {"regex": "(?=a)b"}}, 400, "look-around"),
    "enormous regex": ({"structured_outputs": {"regex": "a" * 5_000}}, 400, "4096"),
    "two grammars": ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, 400, "exactly one"),
    "no choice": ({"structured_outputs": {"choice": []}}, 400, "choice"),
    "deep schema": ({"structured_outputs": {"json": json.loads('{"not":' * 150 + "{}" + "}" * 150)}}, 400, "levels"),
    "no schema": ({"structured_outputs": {"json": "{"}}, 400, "json"),
    "no token left": ({"structured_outputs": {"regex": "a"}, "allowed_token_ids": [50]}, 400, "no token"),
}


REFUSED_BY_BOTH = [
    *("one of two empty", "allowed id outside", "no tokens", "negative temperature", "too many logprobs"),
    *("unknown model", "invalid regex", "lookahead", "a scored stream"),
]


@pytest.mark.parametrize(("body", "status", "words"), [BAD[name] for name in REFUSED_BY_BOTH], ids=REFUSED_BY_BOTH)
def test_bad_input_is_refused_by_both_servers(
    completions: CompletionsClient, body: dict[str, Any], status: int, words: str
) -> None:
    response = completions.ask(**body)

    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert error["code"] == status


@pytest.mark.parametrize(("body", "status", "words"), BAD.values(), ids=BAD.keys())
def test_the_error_names_the_bad_input(server: Server, body: dict[str, Any], status: int, words: str) -> None:
    response = server.ask(**body)

    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert error["code"] == status
    assert error["type"] == ("NotFoundError" if status == 404 else "BadRequestError")


def test_a_long_prompt_is_refused_with_both_numbers(server: Server) -> None:
    message = server.ask(prompt=[5] * 510, max_tokens=3).json()["error"]["message"]

    assert "512" in message
    assert "510" in message


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}'])
def test_a_body_that_is_not_a_request_is_refused(server: Server, body: bytes) -> None:
    response = server.client.post("/v1/completions", content=body)

    assert response.status_code == 400
    assert response.json()["error"]["type"] == "BadRequestError"


def test_a_body_over_the_limit_is_refused(server: Server) -> None:
    response = server.client.post("/v1/completions", content=b"x" * (9 * 1024**2))

    assert response.status_code == 413


def test_unknown_routes_have_the_same_error_format(server: Server) -> None:
    assert server.client.get("/v1/nothing").json()["error"]["code"] == 404
    assert server.client.get("/v1/completions").status_code == 405


def test_the_server_does_not_import_torch() -> None:
    code = "import sys, worker.inference.server.app; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_head_is_answered_as_get_is_and_a_trailing_slash_is_served(server: Server) -> None:
    for path in ("/health", "/health/", "/v1/models"):
        head, got = server.client.head(path), server.client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers.get("content-length") == got.headers.get("content-length")
    assert server.client.head("/v1/completions").status_code == 405
