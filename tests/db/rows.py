"""Rows with the least in them that the tables accept."""

from datetime import UTC, datetime

from app.db.tables import AdapterRow, JobRow
from app.domain.identity import new_id
from app.domain.jobs import JobStatus


def job_row() -> JobRow:
    """A training job that waits."""
    job_id = new_id("job")
    return JobRow(
        id=job_id, kind="train", name=job_id, status=JobStatus.QUEUED.value, spec={}, created_at=datetime.now(UTC)
    )


def adapter_row(job_id: str) -> AdapterRow:
    return AdapterRow(
        id=new_id("adp"),
        name=f"of-{job_id}",
        digest="0" * 64,
        kind="peft",
        job_id=job_id,
        base_model="tiny",
        files={},
        manifest={},
        bytes=1,
        created_at=datetime.now(UTC),
    )
