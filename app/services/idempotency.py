"""Idempotency keys: a repeated POST gives the first answer again instead of doing the work twice."""

import hashlib
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import IntegrityError

from app.db import Database
from app.domain.errors import ConflictError, InvalidError, Problem

LONGEST_KEY = 255


class Idempotency:
    def __init__(self, database: Database) -> None:
        self._database = database

    def once(
        self, route: str, key: str | None, body: bytes, work: Callable[[], tuple[int, dict[str, Any]]]
    ) -> tuple[int, dict[str, Any]]:
        """`work`'s (status, answer), or the answer that this key had before. An error is not kept: try again."""
        if key is None:
            return work()
        if not key or len(key) > LONGEST_KEY or not key.isprintable():
            raise InvalidError(
                f"Idempotency-Key takes 1 to {LONGEST_KEY} printable characters", code="bad_idempotency_key"
            )
        digest = hashlib.sha256(body).hexdigest()
        if known := self._known(route, key, digest):
            return known
        try:
            with self._database.write() as unit:
                unit.keys.begin(route, key, digest)
        except IntegrityError:
            return self._known(route, key, digest) or self._under_way()
        try:
            status, answer = work()
        except BaseException:
            with self._database.write() as unit:
                unit.keys.forget(route, key)
            raise
        with self._database.write() as unit:
            unit.keys.settle(route, key, status, answer)
        return status, answer

    def _known(self, route: str, key: str, digest: str) -> tuple[int, dict[str, Any]] | None:
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
        if row.status is None or row.response is None:
            return self._under_way()
        return row.status, row.response

    def _under_way(self) -> tuple[int, dict[str, Any]]:
        raise ConflictError("the first request with this Idempotency-Key is still under way", code="request_under_way")
