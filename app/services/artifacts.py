"""Artifacts: files that a job writes for its user in addition to the adapter."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from app.db import Database, Unit
from app.db.tables import ArtifactRow, JobRow
from app.domain.errors import NotFoundError
from app.domain.jobs import Artifact, Lease
from app.services.jobs import unknown_job
from app.services.staged_blobs import staged
from app.storage import Blob, Blobs


class Artifacts:
    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self._blobs = blobs

    def put(self, lease: Lease, path: Path) -> None:
        """Store a file under its own name. It replaces an earlier attempt's file of that name."""
        with staged(self._database, self._blobs) as blobs:
            lost = self._commit(lease, path.name, blobs.put_file(path))
        self._blobs.discard(lost)

    def _commit(self, lease: Lease, name: str, blob: Blob) -> set[str]:
        """Write the artifact's row. Returns the blobs that are now unreferenced."""
        row = ArtifactRow(
            job_id=lease.job_id, name=name, digest=blob.digest, bytes=blob.size, created_at=datetime.now(UTC)
        )
        with self._database.write() as unit:
            unit.jobs.write(lease, owner=lease.owner)
            before = {old.digest for old in unit.artifacts.list_artifacts(lease.job_id) if old.name == name}
            unit.artifacts.put(row)
            return unit.blob_references.unreferenced(before)

    def list_artifacts(self, reference: str) -> list[Artifact]:
        """A job's artifacts, by name."""
        with self._database.read() as unit:
            rows = unit.artifacts.list_artifacts(_get_job_row(unit, reference).id)
        return [Artifact(name=row.name, bytes=row.bytes, digest=row.digest, created_at=row.created_at) for row in rows]

    def stream(self, reference: str, name: str) -> Iterator[bytes]:
        """Stream one artifact. Raises NotFoundError before the first byte."""
        with self._database.read() as unit:
            job = _get_job_row(unit, reference)
            rows = unit.artifacts.list_artifacts(job.id)
        found = next((row for row in rows if row.name == name), None)
        if found is None:
            there = ", ".join(row.name for row in rows) or "none yet"
            raise NotFoundError(f"{job.name} has no artifact {name!r}; it has: {there}", code="unknown_artifact")
        self._blobs.size(found.digest)
        return self._blobs.stream(found.digest)


def _get_job_row(unit: Unit, reference: str) -> JobRow:
    row = unit.jobs.find(reference)
    if row is None:
        raise unknown_job(reference)
    return row
