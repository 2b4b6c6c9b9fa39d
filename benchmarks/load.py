"""A load generator: many clients, each with one connection, request one path repeatedly.

    python -m benchmarks.load PORT PATH [--clients 200] [--seconds 6] [--period 0]

It runs in a process of its own and speaks HTTP/1.1 over bare asyncio protocols, so that what is measured is the
server. It knows nothing of what it asks for. With a period each client asks once in that time, at staggered
moments, and a latency counts from when the question was due (a slow answer does not hide those behind it); without
one a client asks again as soon as it has its answer.
"""

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field

GRACE_SECONDS = 10.0
MOST_REQUESTS = 500_000


@dataclass
class Round:
    """The settings and counts of one round. Times are seconds of the event loop's clock."""

    request: bytes
    period: float
    over_at: float = 0.0
    latencies: list[float] = field(default_factory=list)
    failed: int = 0


class Client(asyncio.Protocol):
    """One connection, which sends a request after each response."""

    def __init__(self, of: Round) -> None:
        self._of = of
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._due = 0.0
        self._waiting = False
        self._transport: asyncio.Transport | None = None
        self.done = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, due: float) -> None:
        """Ask now, for a question that was due at `due`; a client whose time is over says so instead."""
        if due >= self._of.over_at or len(self._of.latencies) >= MOST_REQUESTS or self._transport is None:
            self._finish()
            return
        self._due, self._waiting = due, True
        self._transport.write(self._of.request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found or len(body) < _length(head):
            return
        self._buffer, self._waiting = b"", False
        now = self._loop.time()
        if head.startswith(b"HTTP/1.1 200"):
            self._of.latencies.append(now - self._due)
        else:
            self._of.failed += 1
        self._next(now)

    def connection_lost(self, _error: Exception | None) -> None:
        self._transport = None
        self._finish()

    def _next(self, now: float) -> None:
        due = self._due + self._of.period if self._of.period else now
        if due <= now:
            self.ask(due)
        else:
            self._loop.call_at(due, self.ask, due)

    def _finish(self) -> None:
        if not self.done.done():
            self._of.failed += self._waiting
            self.done.set_result(None)


def _length(head: bytes) -> int:
    name = head.lower().index(b"content-length:")
    return int(head[name + 15 :].split(b"\r\n", 1)[0])


async def _load(port: int, path: str, clients: int, seconds: float, period: float) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    asked = Round(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode(), period)
    opened = [await loop.create_connection(lambda: Client(asked), "127.0.0.1", port) for _ in range(clients)]
    began = loop.time()
    asked.over_at = began + seconds
    for number, (_transport, client) in enumerate(opened):
        loop.call_at(began + number / clients * period, client.ask, began + number / clients * period)
    await asyncio.wait([client.done for _, client in opened], timeout=seconds + GRACE_SECONDS)
    took = loop.time() - began
    unanswered = sum(not client.done.done() for _, client in opened)
    for transport, _client in opened:
        transport.abort()
    return _figures(asked.latencies, asked.failed + unanswered, took)


def _figures(latencies: list[float], failed: int, seconds: float) -> dict[str, float]:
    """Requests, failures, requests per second, and latencies in milliseconds."""
    ordered = sorted(latencies) or [float("nan")]
    at = {name: ordered[int(share * (len(ordered) - 1))] for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}
    return {
        "requests": len(latencies),
        "failed": failed,
        "seconds": round(seconds, 3),
        "per_second": round(len(latencies) / seconds, 1),
        **{f"{name}_ms": round(value * 1e3, 2) for name, value in at.items()},
        "client_cpu_seconds": round(time.process_time(), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--period", type=float, default=0.0)
    given = parser.parse_args()
    print(json.dumps(asyncio.run(_load(given.port, given.path, given.clients, given.seconds, given.period))))


if __name__ == "__main__":
    main()
