"""Stored checkpoints: publish one as an adapter, and delete the expired ones."""

import json
from datetime import UTC, datetime, timedelta

from sqlalchemy.exc import IntegrityError

from app.db import Database, Unit
from app.db.tables import AdapterRow, CheckpointRow, JobRow
from app.domain.adapters import (
    CONFIG_FILE,
    EXTRA_FILES,
    MANIFEST_FILE,
    MODEL_CARD_FILE,
    WEIGHTS_FILE,
    Adapter,
    Manifest,
    adapter_digest,
    render_model_card,
)
from app.domain.errors import ConflictError, NotFoundError
from app.domain.identity import new_id
from app.domain.jobs import TERMINAL
from app.services.adapters import Adapters
from app.services.jobs import unknown_job
from app.services.naming import check_name
from app.services.staged_blobs import staged
from app.storage import Blobs


class Checkpoints:
    def __init__(self, database: Database, blobs: Blobs, adapters: Adapters) -> None:
        self._database = database
        self._blobs = blobs
        self._adapters = adapters

    def publish(self, reference: str, update: int, name: str | None) -> Adapter:
        """Publish a checkpoint of a job as an adapter of its own, while the job runs or after it.

        The files are shared, not copied. The adapter remains when the checkpoint is deleted.
        """
        check_name(name)
        with self._database.read() as unit:
            job, checkpoint = _get_rows(unit, reference, update)
            named = name or f"{job.name}-{update}"
            _refuse_taken(unit, named)  # before anything is stored
        if checkpoint.manifest is None:
            raise ConflictError(
                f"the checkpoint of update {update} was written by a version that could not publish one",
                code="not_publishable",
            )
        manifest = Manifest.model_validate(checkpoint.manifest)
        with staged(self._database, self._blobs) as blobs:
            row = self._row(checkpoint, manifest, named, blobs)
            self._commit(row, job.id, update)
        self._adapters.on_disk(row.digest)
        return self._adapters.get(row.id)

    def _commit(self, row: AdapterRow, job_id: str, update: int) -> None:
        try:
            with self._database.write() as unit:
                # The blobs exist as long as the row of the checkpoint or of the adapter.
                _get_rows(unit, job_id, update)
                _refuse_taken(unit, row.name)
                unit.adapters.add(row)
                data = {"adapter_id": row.id, "digest": row.digest, "update": update}
                message = f"the checkpoint of update {update} was published as {row.id}"
                unit.jobs.add_event(job_id, "checkpoint_published", message, "info", data)
        except IntegrityError:  # another request took the name at the same time
            raise _name_taken("an adapter", row.name) from None

    def _row(self, checkpoint: CheckpointRow, manifest: Manifest, name: str, blobs: Blobs) -> AdapterRow:
        weights, config = WEIGHTS_FILE[manifest.kind], CONFIG_FILE[manifest.kind]
        names = (weights, config, *EXTRA_FILES[manifest.kind])
        files = {file: checkpoint.files[file] for file in names if file in checkpoint.files}
        size = sum(self._blobs.size(digest) for digest in files.values())
        document = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True)
        for file, text in ((MANIFEST_FILE, document), (MODEL_CARD_FILE, render_model_card(name, manifest))):
            blob = blobs.put_bytes(text.encode())
            files[file], size = blob.digest, size + blob.size
        return AdapterRow(
            id=new_id("adp"),
            name=name,
            digest=adapter_digest(files[weights], self._blobs.get_bytes(files[config])),
            kind=manifest.kind,
            job_id=None,
            base_model=manifest.base.name,
            files=files,
            manifest=manifest.model_dump(mode="json"),
            bytes=size,
            created_at=datetime.now(UTC),
        )

    def expire(self, hours: float) -> int:
        """Delete the checkpoints of jobs that ended at least `hours` ago. Returns how many were deleted."""
        before = datetime.now(UTC) - timedelta(hours=hours)
        with self._database.read() as unit:
            if not unit.jobs.has_checkpoints_of_ended(before):
                return 0
        with self._database.write() as unit:
            deleted = unit.jobs.drop_checkpoints_of_ended(before)
            lost = unit.blob_references.unreferenced({blob for files in deleted for blob in files.values()})
        self._blobs.discard(lost)
        return len(deleted)


def _get_rows(unit: Unit, reference: str, update: int) -> tuple[JobRow, CheckpointRow]:
    job = unit.jobs.find(reference)
    if job is None:
        raise unknown_job(reference)
    found = unit.jobs.find_checkpoint(job.id, update)
    if found is None:
        known = ", ".join(str(row.update) for row in unit.jobs.checkpoints(job.id)) or "none"
        raise NotFoundError(
            f"{job.name} has no checkpoint of update {update}; it has: {known}", code="unknown_checkpoint"
        )
    return job, found


def _refuse_taken(unit: Unit, name: str) -> None:
    """Raise ConflictError if an adapter has the name, or a job that will publish its adapter under it."""
    if unit.adapters.find(name) is not None:
        raise _name_taken("an adapter", name)
    job = unit.jobs.find(name)
    if job is not None and job.status not in TERMINAL:
        raise _name_taken("a job that has not ended", name)


def _name_taken(what: str, name: str) -> ConflictError:
    return ConflictError(f"there is {what} named {name!r} already; choose another name", code="name_taken")
