"""Idempotency keys: the first answer to a keyed request, kept to be given again.

Whoever holds a key while its request is under way writes with a stamp, the time of its last sign of life. One that was
taken for dead and whose key another took has an old stamp, and changes nothing.
"""

from typing import Any

from sqlalchemy import ColumnElement, Double, and_, delete, type_coerce, update
from sqlalchemy.orm import Session

from app.db.base import clock
from app.db.repositories.rows import insert_into
from app.db.tables import IdempotencyRow

KEPT_SECONDS = 24 * 3_600.0
_stamp = type_coerce(IdempotencyRow.created_at, Double)  # a datetime would round the database's time


class IdempotencyKeys:
    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, route: str, key: str) -> IdempotencyRow | None:
        return self._session.get(IdempotencyRow, (key, route))

    def take(self, route: str, key: str, body: str, patience: float) -> float | None:
        """The stamp of a key that is ours now: it was free, or its request gave no sign for `patience` seconds.

        One statement, so that of several who ask one gets it. Expired keys go.
        """
        self._session.execute(delete(IdempotencyRow).where(_stamp < clock() - KEPT_SECONDS))
        fresh = insert_into(self._session, IdempotencyRow).values(key=key, route=route, body=body, created_at=clock())
        abandoned = and_(IdempotencyRow.status.is_(None), IdempotencyRow.body == body, _stamp < clock() - patience)
        taken = fresh.on_conflict_do_update(
            index_elements=["key", "route"], set_={"created_at": clock()}, where=abandoned
        )
        stamp: float | None = self._session.scalar(taken.returning(_stamp))
        return stamp

    def beat(self, route: str, key: str, stamp: float) -> float | None:
        """A sign of life, and the stamp to go on with; None when the key is not ours any more."""
        alive = update(IdempotencyRow).where(_held(route, key, stamp)).values(created_at=clock()).returning(_stamp)
        newer: float | None = self._session.scalar(alive)
        return newer

    def settle(self, route: str, key: str, stamp: float, status: int, response: dict[str, Any]) -> None:
        held = _held(route, key, stamp)
        self._session.execute(update(IdempotencyRow).where(held).values(status=status, response=response))

    def forget(self, route: str, key: str, stamp: float) -> None:
        self._session.execute(delete(IdempotencyRow).where(_held(route, key, stamp)))


def _held(route: str, key: str, stamp: float) -> ColumnElement[bool]:
    return and_(IdempotencyRow.key == key, IdempotencyRow.route == route, _stamp == stamp)
