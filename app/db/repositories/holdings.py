"""Which blobs are still needed by what shares them: checkpoints, adapters and artifacts hold equal files by content."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.tables import AdapterRow, ArtifactRow, CheckpointRow


class Holdings:
    def __init__(self, session: Session) -> None:
        self._session = session

    def unneeded(self, blobs: set[str]) -> set[str]:
        """Those of the blobs that no checkpoint, no adapter and no artifact holds."""
        left = blobs - set(self._session.scalars(select(ArtifactRow.digest).where(ArtifactRow.digest.in_(blobs))))
        for column in (CheckpointRow.files, AdapterRow.files):
            for files in self._session.scalars(select(column)):
                left -= set(files.values())
        return left
