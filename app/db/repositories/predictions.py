"""Stored predictions."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy.orm import Session

from app.db.tables import PredictionRow


class Predictions:
    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, prediction_id: str, answer: dict[str, Any]) -> None:
        self._session.add(PredictionRow(id=prediction_id, answer=answer, created_at=datetime.now(UTC)))

    def get(self, prediction_id: str) -> dict[str, Any] | None:
        row = self._session.get(PredictionRow, prediction_id)
        return row.answer if row else None
