"""Idempotency keys: the stored first answer to a keyed request.

A running request writes with its stamp, the time of its last heartbeat. If another request takes the key over, the
stamp changes, and the writes of the first one change no row.
"""

from typing import Any

from sqlalchemy import ColumnElement, Double, and_, delete, type_coerce, update
from sqlalchemy.orm import Session

from app.db.base import clock
from app.db.repositories.rows import insert_into
from app.db.tables import IdempotencyRow

KEY_TTL_SECONDS = 24 * 3_600.0
_stamp = type_coerce(IdempotencyRow.created_at, Double)  # a datetime would round the database's time


class IdempotencyKeys:
    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, route: str, key: str) -> IdempotencyRow | None:
        return self._session.get(IdempotencyRow, (key, route))

    def acquire(self, route: str, key: str, body: str, lease_seconds: float) -> float | None:
        """Acquire a key that is free, or that had no heartbeat for `lease_seconds`. Returns its stamp, or None.

        It is one statement, so that exactly one of several requests gets the key. Expired keys are deleted.
        """
        self._session.execute(delete(IdempotencyRow).where(_stamp < clock() - KEY_TTL_SECONDS))
        fresh = insert_into(self._session, IdempotencyRow).values(key=key, route=route, body=body, created_at=clock())
        abandoned = and_(IdempotencyRow.status.is_(None), IdempotencyRow.body == body, _stamp < clock() - lease_seconds)
        taken = fresh.on_conflict_do_update(
            index_elements=["key", "route"], set_={"created_at": clock()}, where=abandoned
        )
        stamp: float | None = self._session.scalar(taken.returning(_stamp))
        return stamp

    def renew(self, route: str, key: str, stamp: float) -> float | None:
        """Send a heartbeat. Returns the new stamp; None if another request owns the key."""
        renewed = update(IdempotencyRow).where(_owned(route, key, stamp)).values(created_at=clock()).returning(_stamp)
        newer: float | None = self._session.scalar(renewed)
        return newer

    def save_answer(self, route: str, key: str, stamp: float, status: int, response: dict[str, Any]) -> None:
        owned = _owned(route, key, stamp)
        self._session.execute(update(IdempotencyRow).where(owned).values(status=status, response=response))

    def release(self, route: str, key: str, stamp: float) -> None:
        self._session.execute(delete(IdempotencyRow).where(_owned(route, key, stamp)))


def _owned(route: str, key: str, stamp: float) -> ColumnElement[bool]:
    return and_(IdempotencyRow.key == key, IdempotencyRow.route == route, _stamp == stamp)
