"""The tables. Documents that are read whole (specs, reports, manifests) are JSON. Searched values are columns."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Double, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base

ID = String(40)
DIGEST = String(64)
NAME = String(200)


class DatasetRow(Base):
    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    name: Mapped[str] = mapped_column(NAME, unique=True)
    digest: Mapped[str] = mapped_column(DIGEST, unique=True)
    filename: Mapped[str] = mapped_column(Text)
    bytes: Mapped[int] = mapped_column(BigInteger)
    rows: Mapped[int]
    report: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class CorpusRow(Base):
    __tablename__ = "corpora"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    name: Mapped[str] = mapped_column(NAME, unique=True)
    digest: Mapped[str] = mapped_column(DIGEST, unique=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    pages: Mapped[int]
    report: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class BaseModelRow(Base):
    __tablename__ = "base_models"

    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    digest: Mapped[str] = mapped_column(DIGEST, index=True)
    tokenizer: Mapped[str] = mapped_column(DIGEST)
    config: Mapped[str] = mapped_column(DIGEST)
    description: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class DeviceRow(Base):
    __tablename__ = "devices"

    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    description: Mapped[dict[str, Any]]
    last_seen: Mapped[datetime]


class ReservationRow(Base):
    """Bytes of a host's device that a tenant's process has reserved.

    Both times are the database's. `expected_until`: when the job should end.
    """

    __tablename__ = "reservations"

    host: Mapped[str] = mapped_column(NAME, primary_key=True)
    owner: Mapped[str] = mapped_column(NAME, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(20))
    bytes: Mapped[int] = mapped_column(BigInteger)
    policy: Mapped[str | None] = mapped_column(String(20))
    job_id: Mapped[str | None] = mapped_column(ID)
    expected_until: Mapped[float | None] = mapped_column(Double)
    lease_until: Mapped[float] = mapped_column(Double)


class JobRow(Base):
    """`lease_until` is in the database's time. `strikes`: attempts lost without a new checkpoint."""

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_status_id", "status", "id"),)

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    name: Mapped[str] = mapped_column(NAME, unique=True)
    status: Mapped[str] = mapped_column(String(20))
    spec: Mapped[dict[str, Any]]
    plan: Mapped[dict[str, Any] | None]
    progress: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    base_model: Mapped[str | None] = mapped_column(NAME)
    adapter_id: Mapped[str | None] = mapped_column(ID)
    owner: Mapped[str | None] = mapped_column(NAME)
    epoch: Mapped[int] = mapped_column(default=0)
    lease_until: Mapped[float | None] = mapped_column(Double)
    attempts: Mapped[int] = mapped_column(default=0)
    strikes: Mapped[int] = mapped_column(default=0)
    event_seq: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class EventRow(Base):
    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    level: Mapped[str] = mapped_column(String(10))
    kind: Mapped[str] = mapped_column(String(40))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]]


class MetricRow(Base):
    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    update: Mapped[int] = mapped_column(primary_key=True)
    values: Mapped[dict[str, Any]]


class CheckpointRow(Base):
    """`manifest`: the manifest of an adapter with these weights. Null in rows of versions without it."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    update: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(DIGEST)
    files: Mapped[dict[str, Any]]
    bytes: Mapped[int] = mapped_column(BigInteger)
    validation_loss: Mapped[float | None] = mapped_column(Double)
    manifest: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]


class ArtifactRow(Base):
    """A file that a job writes for its user in addition to the adapter."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    digest: Mapped[str] = mapped_column(DIGEST)
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class EvaluationAnswerRow(Base):
    """The answer of one run of an evaluation job to its claim number `claim`, from 0."""

    __tablename__ = "evaluation_answers"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    run: Mapped[str] = mapped_column(NAME, primary_key=True)
    claim: Mapped[int] = mapped_column(primary_key=True)
    answer: Mapped[dict[str, Any]]


class AdapterRow(Base):
    """`job_id`: the job that published it at its end. Null for a published checkpoint, and if the job was deleted.

    `calibration`: of its verdicts' probabilities. Null until an evaluation has fitted one.
    """

    __tablename__ = "adapters"
    __table_args__ = (UniqueConstraint("job_id"),)

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    name: Mapped[str] = mapped_column(NAME, unique=True)
    digest: Mapped[str] = mapped_column(DIGEST, index=True)
    kind: Mapped[str] = mapped_column(String(10))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    base_model: Mapped[str] = mapped_column(NAME)
    files: Mapped[dict[str, Any]]
    manifest: Mapped[dict[str, Any]]
    calibration: Mapped[dict[str, Any] | None]
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class AliasRow(Base):
    """A name that points at an adapter or a corpus. A prediction that names none uses `default`."""

    __tablename__ = "aliases"

    resource: Mapped[str] = mapped_column(String(20), primary_key=True)
    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    target: Mapped[str] = mapped_column(ID)


class PredictionRow(Base):
    __tablename__ = "predictions"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    name: Mapped[str | None] = mapped_column(NAME, unique=True, index=True)
    answer: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class IdempotencyRow(Base):
    """The first answer to a keyed request. `response` is null while that request runs.

    `created_at` is the time of the request's last heartbeat while it runs, and then the time of its answer.
    """

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    route: Mapped[str] = mapped_column(String(100), primary_key=True)
    body: Mapped[str] = mapped_column(DIGEST)
    status: Mapped[int | None]
    response: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]


class EncodingRow(Base):
    """A dataset's rows as token ids. `key` is a hash of all that they depend on (dataset, tokenizer, format, policy).

    `dataset` is the dataset's digest. Null in rows of versions without it.
    """

    __tablename__ = "encodings"

    key: Mapped[str] = mapped_column(DIGEST, primary_key=True)
    dataset: Mapped[str | None] = mapped_column(DIGEST, index=True)
    blob: Mapped[str] = mapped_column(DIGEST)
    summary: Mapped[dict[str, Any]]
