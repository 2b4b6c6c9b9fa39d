"""Datasets, corpora, base models, devices and aliases: rows that are written once and read often."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from app.db.repositories.paging import list_newest_first
from app.db.repositories.rows import first, put
from app.db.tables import AliasRow, BaseModelRow, CorpusRow, DatasetRow, DeviceRow, EncodingRow, JobRow
from app.domain.jobs import TERMINAL


class Datasets:
    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, row: DatasetRow) -> None:
        self._session.add(row)
        self._session.flush()

    def find(self, reference: str) -> DatasetRow | None:
        """Find a row by id or by name."""
        wanted = select(DatasetRow).where(or_(DatasetRow.id == reference, DatasetRow.name == reference))
        return first(self._session, wanted)

    def by_digest(self, digest: str) -> DatasetRow | None:
        return first(self._session, select(DatasetRow).where(DatasetRow.digest == digest))

    def list_datasets(self, after: str | None, limit: int) -> tuple[list[DatasetRow], bool]:
        return list_newest_first(self._session, DatasetRow, DatasetRow.id, after, limit)

    def list_unfinished_job_ids(self, dataset_id: str) -> list[str]:
        """Ids of the unfinished jobs that use this dataset."""
        live = JobRow.status.not_in([status.value for status in TERMINAL])
        return list(self._session.scalars(select(JobRow.id).where(JobRow.dataset_id == dataset_id, live)))

    def remove(self, row: DatasetRow) -> None:
        """Delete the row. The reference of finished jobs becomes null; their spec still names the dataset."""
        for job in self._session.scalars(select(JobRow).where(JobRow.dataset_id == row.id)):
            job.dataset_id = None
        self._session.flush()
        self._session.delete(row)


class Corpora:
    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, row: CorpusRow) -> None:
        self._session.add(row)
        self._session.flush()

    def find(self, reference: str) -> CorpusRow | None:
        wanted = select(CorpusRow).where(or_(CorpusRow.id == reference, CorpusRow.name == reference))
        return first(self._session, wanted)

    def by_digest(self, digest: str) -> CorpusRow | None:
        return self._session.scalars(select(CorpusRow).where(CorpusRow.digest == digest)).first()

    def list_corpora(self, after: str | None, limit: int) -> tuple[list[CorpusRow], bool]:
        return list_newest_first(self._session, CorpusRow, CorpusRow.id, after, limit)

    def remove(self, row: CorpusRow) -> None:
        self._session.delete(row)


class BaseModels:
    def __init__(self, session: Session) -> None:
        self._session = session

    def put(self, row: BaseModelRow) -> None:
        put(self._session, row)

    def get(self, name: str) -> BaseModelRow | None:
        return self._session.get(BaseModelRow, name)

    def by_digest(self, digest: str) -> BaseModelRow | None:
        return self._session.scalars(select(BaseModelRow).where(BaseModelRow.digest == digest)).first()

    def list_base_models(self) -> list[BaseModelRow]:
        return list(self._session.scalars(select(BaseModelRow).order_by(BaseModelRow.name)))


class Devices:
    def __init__(self, session: Session) -> None:
        self._session = session

    def put(self, name: str, description: dict[str, Any]) -> None:
        put(self._session, DeviceRow(name=name, description=description, last_seen=datetime.now(UTC)))

    def list_devices(self) -> list[DeviceRow]:
        return list(self._session.scalars(select(DeviceRow).order_by(DeviceRow.name)))


class Aliases:
    """(resource, name) → id. To move an alias changes one row."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def point(self, resource: str, name: str, target: str) -> None:
        put(self._session, AliasRow(resource=resource, name=name, target=target))

    def find_target(self, resource: str, name: str) -> str | None:
        row = self._session.get(AliasRow, (resource, name))
        return row.target if row else None

    def names_by_target(self, resource: str) -> dict[str, list[str]]:
        """Target id → the names that point at it."""
        found: dict[str, list[str]] = {}
        for row in self._session.scalars(select(AliasRow).where(AliasRow.resource == resource)):
            found.setdefault(row.target, []).append(row.name)
        return found

    def drop(self, resource: str, target: str) -> None:
        chosen = (AliasRow.resource == resource) & (AliasRow.target == target)
        self._session.execute(delete(AliasRow).where(chosen))


class Encodings:
    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, key: str) -> EncodingRow | None:
        return self._session.get(EncodingRow, key)

    def put(self, row: EncodingRow) -> None:
        put(self._session, row)

    def remove(self, dataset: str) -> set[str]:
        """Delete the encodings of a dataset. Returns the blobs that no other encoding has."""
        deleted = delete(EncodingRow).where(EncodingRow.dataset == dataset).returning(EncodingRow.blob)
        return self.unreferenced(set(self._session.scalars(deleted)))

    def unreferenced(self, blobs: set[str]) -> set[str]:
        """The blobs that no encoding has."""
        return blobs - set(self._session.scalars(select(EncodingRow.blob).where(EncodingRow.blob.in_(blobs))))
