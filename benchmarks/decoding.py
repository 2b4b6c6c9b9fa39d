"""Decode throughput of a completions server: concurrent rows, each with the same number of greedy tokens."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import httpx

from app.generation.transport import ExclusiveTransport
from benchmarks.deployment import BenchmarkError


@dataclass(frozen=True, slots=True)
class Row:
    """One request: its model, and its prompt's token ids."""

    model: str
    prompt: list[int]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a server is asked. `body`: of the question that this row, at this place of the batch, asks for so many
    tokens. `ids`: of the answer's tokens."""

    path: str
    body: Callable[[int, Row, int], dict[str, Any]]
    ids: Callable[[Any], list[int]]


OPENAI = Protocol(
    "/v1/completions",
    lambda _, row, tokens: {
        "model": row.model,
        "prompt": row.prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "return_token_ids": True,
    },
    lambda answer: answer["choices"][0]["token_ids"],
)


def llama_cpp(names: Sequence[str]) -> Protocol:
    """llama.cpp's protocol: an adapter is its index in `names`, and each row has a slot that caches its prompt."""

    def body(slot: int, row: Row, tokens: int) -> dict[str, Any]:
        lora = [{"id": names.index(row.model), "scale": 1.0}] if row.model in names else []
        asked = {"prompt": row.prompt, "n_predict": tokens, "temperature": 0, "lora": lora, "id_slot": slot}
        return asked | {"return_tokens": True}

    return Protocol("/completion", body, lambda answer: answer["tokens"])


class Asker:
    """Sends many rows at once, each over its own connection."""

    def __init__(self, url: str, rows: int, protocol: Protocol = OPENAI) -> None:
        # A connection serves one request only: a server may close an idle connection just when a request is sent on it.
        self._client = httpx.Client(base_url=url, timeout=600, transport=ExclusiveTransport(rows, idle_seconds=0))
        self._pool = ThreadPoolExecutor(rows)
        self._protocol = protocol

    def ask(self, rows: Sequence[Row], tokens: int, **options: Any) -> tuple[float, list[list[int]]]:
        """(seconds until all have answered, the ids of each answer)."""
        start = threading.Barrier(len(rows) + 1)

        def one(place: int, row: Row) -> list[int]:
            body = self._protocol.body(place, row, tokens) | options
            start.wait()
            answer = self._client.post(self._protocol.path, json=body)
            if not answer.is_success:
                raise BenchmarkError(f"{answer.status_code}: {answer.text[:500]}")
            return self._protocol.ids(answer.json())

        futures = [self._pool.submit(one, *each) for each in enumerate(rows)]
        start.wait()
        began = time.perf_counter()
        answers = [future.result() for future in futures]
        return time.perf_counter() - began, answers

    def close(self) -> None:
        self._pool.shutdown()
        self._client.close()


class Way(NamedTuple):
    """Rows to send to a server, and the request options."""

    url: str
    rows: Sequence[Row]
    options: Mapping[str, Any] = {}
    protocol: Protocol = OPENAI


def decoding(way: Way, tokens: int, times: int) -> dict[str, Any]:
    """Tokens per second after the first token. The prompts are in the server's prefix cache by then."""
    return in_turns({"": way}, tokens, times)[""]


def in_turns(ways: Mapping[str, Way], tokens: int, times: int) -> dict[str, dict[str, Any]]:
    """The same of ways that a few percent may lie between: round by round, every other one backwards, so that the
    machine's drift meets them alike."""
    rounds: dict[str, list[_Round]] = {name: [] for name in ways}
    with ExitStack() as stack:
        askers = {}
        for name, way in ways.items():
            askers[name] = stack.enter_context(closing(Asker(way.url, len(way.rows), way.protocol)))
            for _ in range(2):
                askers[name].ask(way.rows, 1)
        for turn in range(times):
            for name in list(ways)[:: -1 if turn % 2 else 1]:
                way = ways[name]
                first, _ = askers[name].ask(way.rows, 1)
                whole, answers = askers[name].ask(way.rows, tokens + 1, ignore_eos=True, **way.options)
                rounds[name].append(_Round(first, whole, answers))
    return {name: _figures(tokens, had) for name, had in rounds.items()}


class _Round(NamedTuple):
    """Seconds until the first tokens, seconds of the tokens after them, and the answers' token ids."""

    first: float
    whole: float
    answers: list[list[int]]


def _figures(tokens: int, rounds: Sequence[_Round]) -> dict[str, Any]:
    answers = rounds[-1].answers
    if any(len(ids) != tokens + 1 for ids in answers):
        raise BenchmarkError(f"{tokens + 1} tokens were asked for, {sorted({len(ids) for ids in answers})} came")
    first = median(each.first for each in rounds)
    paces = [len(answers) * tokens / (each.whole - first) for each in rounds]
    return {
        "tokens_per_second": round(median(paces), 1),
        "each": [round(pace, 1) for pace in paces],
        "first_token_seconds": round(first, 3),
        "answers": answers,
    }
