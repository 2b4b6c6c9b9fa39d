"""Files that jobs write for their users in addition to adapters."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.repositories.rows import put
from app.db.tables import ArtifactRow


class Artifacts:
    def __init__(self, session: Session) -> None:
        self._session = session

    def put(self, row: ArtifactRow) -> None:
        put(self._session, row)

    def list_artifacts(self, job_id: str) -> list[ArtifactRow]:
        """The artifacts of a job, sorted by name."""
        wanted = select(ArtifactRow).where(ArtifactRow.job_id == job_id).order_by(ArtifactRow.name)
        return list(self._session.scalars(wanted))
