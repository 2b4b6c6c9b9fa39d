"""References to blobs. Checkpoints, adapters and artifacts with equal files refer to one blob."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.tables import AdapterRow, ArtifactRow, CheckpointRow


class BlobReferences:
    def __init__(self, session: Session) -> None:
        self._session = session

    def unreferenced(self, blobs: set[str]) -> set[str]:
        """Those of `blobs` to which no checkpoint, no adapter and no artifact refers."""
        left = blobs - set(self._session.scalars(select(ArtifactRow.digest).where(ArtifactRow.digest.in_(blobs))))
        for column in (CheckpointRow.files, AdapterRow.files):
            for files in self._session.scalars(select(column)):
                left -= set(files.values())
        return left
