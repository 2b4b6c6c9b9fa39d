"""Idempotency keys: a repeated POST gives the first answer again instead of doing the work twice."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from app.db import Database
from app.domain.errors import ConflictError, InvalidError, Problem, VerituneError

LONGEST_KEY = 255
PATIENCE = 60.0
"""Seconds without a sign of life after which a request's process counts as gone and its key may be taken over."""

BEATS = 6
"""Signs of life in that time: a busy database may swallow some of them."""

Answer = tuple[int, dict[str, Any]]
log = structlog.get_logger(__name__)


class Idempotency:
    def __init__(self, database: Database, patience: float = PATIENCE) -> None:
        self._database = database
        self._patience = patience

    def run_once(
        self,
        route: str,
        key: str | None,
        body: bytes,
        work: Callable[[], Answer],
        final: Callable[[dict[str, Any]], bool] = lambda _answer: True,
    ) -> Answer:
        """`work`'s (status, answer), or the answer that this key had before.

        An error is not kept, nor an answer that is not `final`: try again.
        """
        if key is None:
            return work()
        _check(key)
        digest = hashlib.sha256(body).hexdigest()
        if known := self._known(route, key, digest):
            return known
        with self._database.write() as unit:
            stamp = unit.keys.take(route, key, digest, self._patience)
        if stamp is None:
            return self._known(route, key, digest) or _under_way()
        held = _Held(self._database, route, key, stamp)
        try:
            with held.beating(self._patience / BEATS):
                status, answer = work()
        except BaseException:
            held.forget()
            raise
        if final(answer):
            held.settle(status, answer)
        else:
            held.forget()
        return status, answer

    def _known(self, route: str, key: str, digest: str) -> Answer | None:
        with self._database.read() as unit:
            row = unit.keys.get(route, key)
        if row is None:
            return None
        if row.body != digest:
            raise InvalidError(
                "this Idempotency-Key was used with another body; use a new key for a new request",
                code="idempotency_key_reused",
                problems=(Problem(("header", "Idempotency-Key"), "used with another body"),),
            )
        return None if row.status is None or row.response is None else (row.status, row.response)


class _Held:
    """A key that this request has, as long as its stamp is the newest."""

    def __init__(self, database: Database, route: str, key: str, stamp: float) -> None:
        self._database = database
        self._route = route
        self._key = key
        self._stamp = stamp

    @contextmanager
    def beating(self, period: float) -> Iterator[None]:
        """Give signs of life while the block runs: a batch takes minutes, and nothing else tells it from a dead one."""
        over = threading.Event()
        thread = threading.Thread(target=self._beat, args=(period, over), name="idempotency-key", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def settle(self, status: int, answer: dict[str, Any]) -> None:
        with self._database.write() as unit:
            unit.keys.settle(self._route, self._key, self._stamp, status, answer)

    def forget(self) -> None:
        with self._database.write() as unit:
            unit.keys.forget(self._route, self._key, self._stamp)

    def _beat(self, period: float, over: threading.Event) -> None:
        while not over.wait(period):
            try:
                with self._database.write() as unit:
                    stamp = unit.keys.beat(self._route, self._key, self._stamp)
            except VerituneError as error:
                log.warning("sign_of_life_missed", route=self._route, reason=error.code)
                continue
            if stamp is None:
                return
            self._stamp = stamp


def _check(key: str) -> None:
    if not key or len(key) > LONGEST_KEY or not key.isprintable():
        raise InvalidError(f"Idempotency-Key takes 1 to {LONGEST_KEY} printable characters", code="bad_idempotency_key")


def _under_way() -> Answer:
    raise ConflictError("the first request with this Idempotency-Key is still under way", code="request_under_way")
