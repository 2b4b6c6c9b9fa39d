"""Datasets: an uploaded file becomes a validated, immutable set of trajectories."""

import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from sqlalchemy.exc import IntegrityError

from app.db import Database, Unit
from app.db.tables import DatasetRow
from app.domain.datasets import DatasetReport, RowKind, read_canonical
from app.domain.errors import ConflictError, NotFoundError
from app.domain.frozen import Frozen
from app.domain.identity import new_id
from app.domain.trajectories import Trajectory
from app.ingest import ingest
from app.services.naming import check_name, choose_name, shown_filename, taken_by_another
from app.services.staged_blobs import staged
from app.storage import Blobs, sweep


class Dataset(Frozen):
    """A dataset as the API shows it. `report` is of the upload that created it."""

    id: str
    object: Literal["dataset"] = "dataset"
    name: str
    digest: str
    filename: str
    bytes: int
    rows: int
    report: DatasetReport
    created_at: datetime


class Datasets:
    def __init__(self, database: Database, blobs: Blobs, scratch: Path) -> None:
        self._database = database
        self._blobs = blobs
        self._scratch = scratch

    def scratch_file(self) -> Path:
        """A private file on this host for an incoming upload."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        self.sweep()  # at start, leftovers may have been too young to delete
        handle = tempfile.NamedTemporaryFile(dir=self._scratch, prefix="upload-", delete=False)  # noqa: SIM115
        handle.close()
        return Path(handle.name)

    def sweep(self) -> None:
        """Delete uploads, of datasets and of corpora, whose process was killed."""
        sweep(self._scratch, "upload-*", "ingest-*")

    def create(
        self,
        upload: Path,
        filename: str,
        content_type: str | None,
        name: str | None,
        columns: dict[str, str],
        kind: RowKind = "trajectories",
    ) -> tuple[Dataset, bool]:
        """(the dataset, whether it is new). The same content gives the same dataset, under its first name."""
        check_name(name)
        filename = shown_filename(filename)
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix="ingest-") as directory:
            read = ingest(upload, filename, content_type, Path(directory), columns=columns, kind=kind)
            with self._database.read() as unit:
                if same := _find_existing(unit, read.digest, name):
                    return same, False
                _choose_name(unit, name, filename, read.digest)  # refuse before the content is stored
            with staged(self._database, self._blobs) as blobs:
                size = blobs.put_file(read.canonical).size
                return self._add(read.report, read.digest, size, filename, name)

    def _add(
        self, report: DatasetReport, digest: str, size: int, filename: str, name: str | None
    ) -> tuple[Dataset, bool]:
        try:
            with self._database.write() as unit:
                if same := _find_existing(unit, digest, name):
                    return same, False
                row = DatasetRow(
                    id=new_id("ds"),
                    name=_choose_name(unit, name, filename, digest),
                    digest=digest,
                    filename=filename,
                    bytes=size,
                    rows=report.rows_kept,
                    report=report.model_dump(mode="json"),
                    created_at=datetime.now(UTC),
                )
                unit.datasets.add(row)
        except IntegrityError:  # another upload committed the same content or the same name
            with self._database.read() as unit:
                same = _find_existing(unit, digest, name)
            if same is None:
                raise ConflictError("that name was taken meanwhile; try again", code="name_taken") from None
            return same, False
        return _to_dataset(row), True

    def get(self, reference: str) -> Dataset:
        with self._database.read() as unit:
            return _to_dataset(_get_row(unit, reference))

    def exists(self, reference: str) -> bool:
        with self._database.read() as unit:
            return unit.datasets.find(reference) is not None

    def list_datasets(self, after: str | None, limit: int) -> tuple[list[Dataset], bool]:
        with self._database.read() as unit:
            rows, more = unit.datasets.list_datasets(after, limit)
        return [_to_dataset(row) for row in rows], more

    def preview(self, reference: str, after: int, limit: int) -> tuple[list[Trajectory], bool]:
        """(rows after row number `after`, whether more follow)."""
        with self._database.read() as unit:
            row = _get_row(unit, reference)
        shown = [read_canonical(line) for line in islice(self._lines(row), after, after + limit)]
        return shown, after + limit < row.rows

    def stream(self, reference: str) -> Iterator[Trajectory]:
        """All rows, in order."""
        with self._database.read() as unit:
            row = _get_row(unit, reference)
        return map(read_canonical, self._lines(row))

    def _lines(self, row: DatasetRow) -> Iterator[bytes]:
        rest = b""
        for chunk in self._blobs.stream(row.digest):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines

    def delete(self, reference: str) -> None:
        """Delete a dataset. Raises ConflictError while an unfinished job uses it."""
        with self._database.write() as unit:
            row = _get_row(unit, reference)
            job_ids = unit.datasets.list_unfinished_job_ids(row.id)
            if job_ids:
                raise ConflictError(
                    f"{row.name} is used by {', '.join(job_ids[:5])}; wait for them, or cancel them first",
                    code="dataset_in_use",
                )
            unit.datasets.remove(row)
            encoded = unit.encodings.remove(row.digest)
        self._blobs.discard((row.digest, *encoded))


def _find_existing(unit: Unit, digest: str, name: str | None) -> Dataset | None:
    """The dataset with this content, if any. Raises ConflictError if `name` belongs to another dataset."""
    known = unit.datasets.by_digest(digest)
    if known is None:
        return None
    if name not in (None, known.name) and unit.datasets.find(name) is not None:
        raise taken_by_another(name, known.name, known.id, "dataset")
    return _to_dataset(known)


def _choose_name(unit: Unit, name: str | None, filename: str, digest: str) -> str:
    def taken(wanted: str) -> bool:
        row = unit.datasets.find(wanted)
        return row is not None and row.digest != digest  # another upload may store the same content now

    return choose_name(name, filename, taken, "dataset")


def _get_row(unit: Unit, reference: str) -> DatasetRow:
    row = unit.datasets.find(reference)
    if row is None:
        raise NotFoundError(f"there is no dataset {reference!r}; GET /datasets lists them", code="unknown_dataset")
    return row


def _to_dataset(row: DatasetRow) -> Dataset:
    document: dict[str, Any] = {
        "id": row.id,
        "name": row.name,
        "digest": row.digest,
        "filename": row.filename,
        "bytes": row.bytes,
        "rows": row.rows,
        "report": row.report,
        "created_at": row.created_at,
    }
    return Dataset.model_validate(document)
