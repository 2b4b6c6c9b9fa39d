"""References to blobs. Rows with equal files refer to one blob: a whole model has its base's tokenizer."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.tables import AdapterRow, ArtifactRow, BaseModelRow, CheckpointRow, CorpusRow, DatasetRow, EncodingRow

SINGLE_BLOB_COLUMNS = (
    ArtifactRow.digest,
    BaseModelRow.config,
    BaseModelRow.tokenizer,
    CorpusRow.digest,
    DatasetRow.digest,
    EncodingRow.blob,
)


class BlobReferences:
    def __init__(self, session: Session) -> None:
        self._session = session

    def unreferenced(self, blobs: set[str]) -> set[str]:
        """The blobs to which no row refers."""
        left = set(blobs)
        for column in SINGLE_BLOB_COLUMNS:
            left -= set(self._session.scalars(select(column).where(column.in_(blobs))))
        for files_column in (CheckpointRow.files, AdapterRow.files):
            for files in self._session.scalars(select(files_column)):
                left -= set(files.values())
        return left
