"""Stored predictions."""

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from app.db.repositories.paging import list_newest_first
from app.db.repositories.rows import first
from app.db.tables import PredictionRow


class Predictions:
    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, row: PredictionRow) -> None:
        self._session.add(row)
        self._session.flush()

    def find(self, reference: str) -> PredictionRow | None:
        """Find a row by id or by name."""
        wanted = select(PredictionRow).where(or_(PredictionRow.id == reference, PredictionRow.name == reference))
        return first(self._session, wanted)

    def delete(self, row: PredictionRow) -> None:
        self._session.delete(row)

    def list_predictions(self, after: str | None, limit: int) -> tuple[list[PredictionRow], bool]:
        return list_newest_first(self._session, PredictionRow, PredictionRow.id, after, limit)
