"""Idempotency keys: the first answer to a keyed request, kept to be given again."""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import delete, insert, update
from sqlalchemy.orm import Session

from app.db.tables import IdempotencyRow

KEPT = timedelta(hours=24)


class IdempotencyKeys:
    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, route: str, key: str) -> IdempotencyRow | None:
        return self._session.get(IdempotencyRow, (key, route))

    def begin(self, route: str, key: str, body: str) -> None:
        """Take the key for a request that is under way; expired keys go."""
        now = datetime.now(UTC)
        self._session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at < now - KEPT))
        values = {"key": key, "route": route, "body": body, "created_at": now}
        self._session.execute(insert(IdempotencyRow).values(**values, status=None, response=None))

    def settle(self, route: str, key: str, status: int, response: dict[str, Any]) -> None:
        chosen = (IdempotencyRow.key == key) & (IdempotencyRow.route == route)
        self._session.execute(update(IdempotencyRow).where(chosen).values(status=status, response=response))

    def forget(self, route: str, key: str) -> None:
        chosen = (IdempotencyRow.key == key) & (IdempotencyRow.route == route)
        self._session.execute(delete(IdempotencyRow).where(chosen))
