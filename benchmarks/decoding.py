"""Decode throughput of a completions server: rows that ask together, each for the same number of greedy tokens."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx

from benchmarks.deployment import BenchmarkError


@dataclass(frozen=True, slots=True)
class Row:
    """One question: who is to answer it, and its ids."""

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
    """llama.cpp's own: adapters by their places among `names`, and a slot for each row, where its prompt is kept."""

    def body(slot: int, row: Row, tokens: int) -> dict[str, Any]:
        lora = [{"id": names.index(row.model), "scale": 1.0}] if row.model in names else []
        asked = {"prompt": row.prompt, "n_predict": tokens, "temperature": 0, "lora": lora, "id_slot": slot}
        return asked | {"return_tokens": True}

    return Protocol("/completion", body, lambda answer: answer["tokens"])


class Asker:
    """Asks many rows at once, on a connection for each."""

    def __init__(self, url: str, rows: int, protocol: Protocol = OPENAI) -> None:
        # None is used twice: a server closes what is idle, and a request that is sent at that moment gets no answer.
        limits = httpx.Limits(max_connections=rows, max_keepalive_connections=0)
        self._client = httpx.Client(base_url=url, timeout=600, limits=limits, trust_env=False)
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


def decoding(
    url: str, rows: Sequence[Row], tokens: int, times: int, *, protocol: Protocol = OPENAI, **options: Any
) -> dict[str, Any]:
    """Tokens a second behind the first one. The prompts are in the server's prefix cache when the time counts."""
    asker = Asker(url, len(rows), protocol)
    try:
        for _ in range(2):
            asker.ask(rows, 1)
        wholes: list[float] = []
        firsts: list[float] = []
        answers: list[list[int]] = []
        for _ in range(times):
            firsts.append(asker.ask(rows, 1)[0])
            seconds, answers = asker.ask(rows, tokens + 1, ignore_eos=True, **options)
            wholes.append(seconds)
    finally:
        asker.close()
    if any(len(ids) != tokens + 1 for ids in answers):
        raise BenchmarkError(f"{tokens + 1} tokens were asked for, {sorted({len(ids) for ids in answers})} came")
    paces = [len(rows) * tokens / (whole - median(firsts)) for whole in wholes]
    return {
        "tokens_per_second": round(median(paces), 1),
        "each": [round(pace, 1) for pace in paces],
        "first_token_seconds": round(median(firsts), 3),
        "answers": answers,
    }
