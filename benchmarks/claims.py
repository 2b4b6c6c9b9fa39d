"""Measures predictions end to end: claims over HTTP, several at a time, with several adapters."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, median
from typing import Any

import httpx

from app.generation.transport import ExclusiveTransport
from benchmarks.deployment import BenchmarkError

Judged = dict[str, Any]


def judging(url: str, claims: Sequence[str], adapters: Sequence[str], corpus: str, at_once: int) -> dict[str, Any]:
    """Return claims per second, latencies in seconds, and tokens; and each claim's verdict."""
    transport = ExclusiveTransport(at_once, idle_seconds=0)  # as in `decoding`: no connection serves two requests
    client = httpx.Client(base_url=url, timeout=900, transport=transport)
    with client, ThreadPoolExecutor(at_once) as pool:

        def one(place: int) -> tuple[float, Judged]:
            body = {"claim": claims[place], "adapter": adapters[place % len(adapters)], "corpus": corpus}
            began = time.perf_counter()
            answer = client.post("/predict", json=body)
            if not answer.is_success:
                raise BenchmarkError(f"{answer.status_code}: {answer.text[:500]}")
            return time.perf_counter() - began, answer.json()

        began = time.perf_counter()
        answers = list(pool.map(one, range(len(claims))))
        seconds = time.perf_counter() - began
    return _figures(seconds, [latency for latency, _ in answers], [judged for _, judged in answers])


def _figures(seconds: float, latencies: list[float], judged: list[Judged]) -> dict[str, Any]:
    ordered = sorted(latencies)
    count = len(judged)
    usage = {key: sum(answer["usage"][key] for answer in judged) / count for key in judged[0]["usage"]}
    return {
        "claims_per_second": round(count / seconds, 3),
        "p50_seconds": round(median(ordered), 2),
        "p95_seconds": round(ordered[int(0.95 * (count - 1))], 2),
        "a_claim": {key: round(value, 1) for key, value in usage.items()},
        "read_tokens_a_claim": round(usage["prompt_tokens"] - usage["cached_tokens"], 1),
        **{f"{part}_seconds_a_claim": _mean(judged, part) for part in ("generation", "scoring", "search")},
        "verdicts": [answer["verdict"] for answer in judged],
        "texts": [answer["text"] for answer in judged],
    }


def _mean(judged: list[Judged], part: str) -> float:
    seconds: list[float] = [answer["timings"][part] for answer in judged]
    return round(mean(seconds), 4)
