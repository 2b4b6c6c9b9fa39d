"""Decode throughput of a completions server: rows that ask together, each for the same number of greedy tokens."""

import threading
import time
from collections.abc import Sequence
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


class Asker:
    """Asks many rows at once, a connection for each."""

    def __init__(self, url: str, rows: int) -> None:
        limits = httpx.Limits(max_connections=rows, max_keepalive_connections=rows)
        self._client = httpx.Client(base_url=url, timeout=600, limits=limits, trust_env=False)
        self._pool = ThreadPoolExecutor(rows)

    def ask(self, rows: Sequence[Row], tokens: int, **options: Any) -> tuple[float, list[list[int]]]:
        """(seconds until all have answered, the ids of each answer)."""
        start = threading.Barrier(len(rows) + 1)

        def one(row: Row) -> list[int]:
            body = {"model": row.model, "prompt": row.prompt, "max_tokens": tokens, "temperature": 0}
            start.wait()
            answer = self._client.post("/v1/completions", json=body | {"return_token_ids": True} | options)
            if not answer.is_success:
                raise BenchmarkError(f"{answer.status_code}: {answer.text[:500]}")
            ids: list[int] = answer.json()["choices"][0]["token_ids"]
            return ids

        futures = [self._pool.submit(one, row) for row in rows]
        start.wait()
        began = time.perf_counter()
        answers = [future.result() for future in futures]
        return time.perf_counter() - began, answers

    def close(self) -> None:
        self._pool.shutdown()
        self._client.close()


def decoding(url: str, rows: Sequence[Row], tokens: int, times: int, **options: Any) -> dict[str, Any]:
    """Tokens a second behind the first one. The prompts are in the server's prefix cache when the time counts."""
    asker = Asker(url, len(rows))
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
