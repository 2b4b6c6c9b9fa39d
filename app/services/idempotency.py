"""Idempotency keys: a repeated POST gets the first answer again, and its work runs once."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from app.db import Database
from app.domain.errors import ConflictError, InvalidError, Problem, VerituneError

LONGEST_KEY = 255
KEY_LEASE_SECONDS = 60.0
"""Seconds without a heartbeat after which a request counts as lost, and another may take its key over."""

HEARTBEATS_PER_LEASE = 6
"""Heartbeats in that time: a busy database may miss some of them."""

Answer = tuple[int, dict[str, Any]]
log = structlog.get_logger(__name__)


class Idempotency:
    def __init__(self, database: Database, lease_seconds: float = KEY_LEASE_SECONDS) -> None:
        self._database = database
        self._lease_seconds = lease_seconds

    def run_once(
        self,
        route: str,
        key: str | None,
        body: bytes,
        work: Callable[[], Answer],
        final: Callable[[dict[str, Any]], bool] = lambda _answer: True,
    ) -> Answer:
        """Run `work` and store its (status, answer), or return the stored answer of this key.

        An error is not stored, nor an answer that is not `final`: a repeated request runs again.
        """
        if key is None:
            return work()
        _check_key(key)
        digest = hashlib.sha256(body).hexdigest()
        if known := self._find_answer(route, key, digest):
            return known
        with self._database.write() as unit:
            stamp = unit.keys.acquire(route, key, digest, self._lease_seconds)
        if stamp is None:
            return self._find_answer(route, key, digest) or _refuse_concurrent()
        owned = _OwnedKey(self._database, route, key, stamp)
        try:
            with owned.heartbeat(self._lease_seconds / HEARTBEATS_PER_LEASE):
                status, answer = work()
        except BaseException:
            owned.release()
            raise
        if final(answer):
            owned.save_answer(status, answer)
        else:
            owned.release()
        return status, answer

    def _find_answer(self, route: str, key: str, digest: str) -> Answer | None:
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


class _OwnedKey:
    """A key that this request owns, as long as the row has its stamp."""

    def __init__(self, database: Database, route: str, key: str, stamp: float) -> None:
        self._database = database
        self._route = route
        self._key = key
        self._stamp = stamp

    @contextmanager
    def heartbeat(self, period: float) -> Iterator[None]:
        """Renew the key while the block runs: a batch takes minutes, and must not count as lost."""
        over = threading.Event()
        thread = threading.Thread(target=self._renew, args=(period, over), name="idempotency-key", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def save_answer(self, status: int, answer: dict[str, Any]) -> None:
        with self._database.write() as unit:
            unit.keys.save_answer(self._route, self._key, self._stamp, status, answer)

    def release(self) -> None:
        with self._database.write() as unit:
            unit.keys.release(self._route, self._key, self._stamp)

    def _renew(self, period: float, over: threading.Event) -> None:
        while not over.wait(period):
            try:
                with self._database.write() as unit:
                    stamp = unit.keys.renew(self._route, self._key, self._stamp)
            except VerituneError as error:
                log.warning("idempotency_heartbeat_missed", route=self._route, reason=error.code)
                continue
            if stamp is None:
                return
            self._stamp = stamp


def _check_key(key: str) -> None:
    if not key or len(key) > LONGEST_KEY or not key.isprintable():
        raise InvalidError(f"Idempotency-Key takes 1 to {LONGEST_KEY} printable characters", code="bad_idempotency_key")


def _refuse_concurrent() -> Answer:
    raise ConflictError("the first request with this Idempotency-Key is still under way", code="request_under_way")
