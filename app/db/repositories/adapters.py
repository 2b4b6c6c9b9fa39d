"""Published adapters."""

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from app.db.repositories.paging import list_newest_first
from app.db.repositories.rows import first
from app.db.tables import AdapterRow


class Adapters:
    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, row: AdapterRow) -> None:
        self._session.add(row)
        self._session.flush()

    def find(self, reference: str) -> AdapterRow | None:
        """Find a row by id or by name."""
        wanted = select(AdapterRow).where(or_(AdapterRow.id == reference, AdapterRow.name == reference))
        return first(self._session, wanted)

    def by_digest(self, digest: str) -> AdapterRow | None:
        """The newest adapter with these weights."""
        wanted = select(AdapterRow).where(AdapterRow.digest == digest).order_by(AdapterRow.id.desc())
        return self._session.scalars(wanted).first()

    def list_adapters(self, after: str | None, limit: int) -> tuple[list[AdapterRow], bool]:
        return list_newest_first(self._session, AdapterRow, AdapterRow.id, after, limit)

    def list_all_adapters(self) -> list[AdapterRow]:
        return list(self._session.scalars(select(AdapterRow)))

    def remove(self, row: AdapterRow) -> None:
        self._session.delete(row)
