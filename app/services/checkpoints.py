"""Checkpoints after they are written: which are kept and for how long, and how one becomes an adapter."""

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
        """Make the weights of one of a job's updates an adapter of its own, while the job runs or after it.

        The checkpoint's files are shared, not copied; the adapter stays when the checkpoint goes.
        """
        check_name(name)
        with self._database.read() as unit:
            job, checkpoint = _found(unit, reference, update)
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
                _found(unit, job_id, update)  # its files are there as long as its row, or the adapter's
                _refuse_taken(unit, row.name)
                unit.adapters.add(row)
                told = {"adapter_id": row.id, "digest": row.digest, "update": update}
                message = f"the checkpoint of update {update} was published as {row.id}"
                unit.jobs.tell(job_id, "checkpoint_published", message, "info", told)
        except IntegrityError:  # taken at the same instant
            raise _taken("an adapter", row.name) from None

    def _row(self, checkpoint: CheckpointRow, manifest: Manifest, name: str, blobs: Blobs) -> AdapterRow:
        weights, config = WEIGHTS_FILE[manifest.kind], CONFIG_FILE[manifest.kind]
        belonging = (weights, config, *EXTRA_FILES[manifest.kind])
        files = {file: checkpoint.files[file] for file in belonging if file in checkpoint.files}
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
        """Remove the checkpoints of jobs that ended so many hours ago or longer; how many there were."""
        before = datetime.now(UTC) - timedelta(hours=hours)
        with self._database.read() as unit:
            if not unit.jobs.has_checkpoints_of_ended(before):
                return 0
        with self._database.write() as unit:
            gone = unit.jobs.drop_checkpoints_of_ended(before)
            lost = unit.blob_references.unreferenced({blob for files in gone for blob in files.values()})
        self._blobs.discard(lost)
        return len(gone)


def _found(unit: Unit, reference: str, update: int) -> tuple[JobRow, CheckpointRow]:
    job = unit.jobs.find(reference)
    if job is None:
        raise unknown_job(reference)
    found = unit.jobs.find_checkpoint(job.id, update)
    if found is None:
        there = ", ".join(str(row.update) for row in unit.jobs.checkpoints(job.id)) or "none"
        raise NotFoundError(
            f"{job.name} has no checkpoint of update {update}; kept are: {there}", code="unknown_checkpoint"
        )
    return job, found


def _refuse_taken(unit: Unit, name: str) -> None:
    """ConflictError where an adapter has the name, or a job that will yet publish one under it."""
    if unit.adapters.find(name) is not None:
        raise _taken("an adapter", name)
    job = unit.jobs.find(name)
    if job is not None and job.status not in TERMINAL:
        raise _taken("a job that has not ended", name)


def _taken(what: str, name: str) -> ConflictError:
    return ConflictError(f"there is {what} named {name!r} already; choose another name", code="name_taken")
