"""Jobs: their state machine as a table, and the objects that the API returns about them.

       ┌────────────(a) lease──────────────┐
    queued ──(b) cancel──► cancelled       ▼
      │  ▲                           ┌─ running ──(e) end──► succeeded · failed
      │  └──(c) lease lost, SIGTERM ─┘   │  │
      │(d) pause                (f) pause│  │(g) cancel
      ▼                                  ▼  ▼
    paused ◄──────(h) settled────── pausing  cancelling ──(i) settled──► cancelled
      └──(j) resume──► queued, (k) cancel──► cancelled

succeeded, failed and cancelled are terminal.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from app.domain.evaluations import EvaluationPlan, EvaluationProgress, EvaluationSpec
from app.domain.frozen import Frozen
from app.domain.plans import Plan
from app.domain.specs import JobKind, TrainSpec
from app.domain.synthesis import RegroundSpec, SynthesisPlan, SynthesisProgress, SynthesisSpec


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED, JobStatus.PAUSED}),
    JobStatus.RUNNING: frozenset(
        {
            JobStatus.SUCCEEDED,
            JobStatus.FAILED,
            JobStatus.CANCELLING,
            JobStatus.PAUSING,
            JobStatus.QUEUED,
        }
    ),
    JobStatus.PAUSING: frozenset({JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLING}),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.CANCELLING: frozenset({JobStatus.CANCELLED, JobStatus.SUCCEEDED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}

TERMINAL = frozenset(status for status, following in TRANSITIONS.items() if not following)
LEASED = frozenset({JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.CANCELLING})
"""States in which an attempt may have the job's lease."""

MAX_ATTEMPTS = 3
"""The job fails after so many strikes: attempts that were lost without a new checkpoint."""


class JobAction(StrEnum):
    """An action on a job that a user may request."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"


ACTION_TRANSITIONS: dict[JobAction, dict[JobStatus, JobStatus]] = {
    JobAction.CANCEL: {
        JobStatus.QUEUED: JobStatus.CANCELLED,
        JobStatus.PAUSED: JobStatus.CANCELLED,
        JobStatus.RUNNING: JobStatus.CANCELLING,
        JobStatus.PAUSING: JobStatus.CANCELLING,
        JobStatus.CANCELLING: JobStatus.CANCELLING,
        JobStatus.CANCELLED: JobStatus.CANCELLED,
    },
    JobAction.PAUSE: {
        JobStatus.QUEUED: JobStatus.PAUSED,
        JobStatus.RUNNING: JobStatus.PAUSING,
        JobStatus.PAUSING: JobStatus.PAUSING,
        JobStatus.PAUSED: JobStatus.PAUSED,
    },
    JobAction.RESUME: {JobStatus.PAUSED: JobStatus.QUEUED},
}
"""Action → current state → next state. A missing pair is a conflict. A state that leads to itself is no change."""


class JobError(Frozen):
    """Why a job failed, and what the user can do."""

    code: str
    message: str
    hint: str | None = None


class JobProgress(Frozen):
    """Progress of a job. `epoch`: passes over the data. `eta_seconds`: estimated from the recent speed.

    `warnings`: reasons to doubt the result of a job that succeeded, such as a rising loss.
    """

    update: int = 0
    total_updates: int
    epoch: float = 0.0
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    warnings: tuple[str, ...] = ()


JobSpec = Annotated[TrainSpec | EvaluationSpec | SynthesisSpec | RegroundSpec, Field(discriminator="kind")]
JobPlan = Annotated[Plan | EvaluationPlan | SynthesisPlan, Field(discriminator="kind")]
AnyProgress = JobProgress | EvaluationProgress | SynthesisProgress


class Lease(Frozen):
    """An attempt's right to a job. Every write carries the epoch, and fails after another attempt began a new epoch."""

    job_id: str
    epoch: int
    owner: str


class Job(Frozen):
    """A job as the API returns it."""

    id: str
    object: Literal["job"] = "job"
    kind: JobKind
    name: str
    status: JobStatus
    spec: JobSpec
    plan: JobPlan | None
    progress: AnyProgress | None
    queue_position: int | None
    attempts: int
    adapter_id: str | None
    error: JobError | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class Event(Frozen):
    """One line of a job's log. `seq` counts from 1 within the job, without gaps."""

    seq: int
    at: datetime
    level: Literal["info", "warning", "error"]
    kind: str
    message: str
    data: dict[str, Any]


class Metric(Frozen):
    """One update of a training job. The validation columns are null if the validation rows were not evaluated."""

    update: int
    epoch: float
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    tokens: int
    labelled_tokens: int
    tokens_per_second: float
    skipped: bool
    seconds: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    validation_verdict_accuracy: float | None = None


class Checkpoint(Frozen):
    """A resumable state of a job. `digest`: of its manifest.

    `best`: it has the lowest validation loss. The job keeps its best checkpoint and the last two.
    """

    update: int
    digest: str
    created_at: datetime
    bytes: int
    validation_loss: float | None = None
    best: bool = False


class Artifact(Frozen):
    """A file that a job writes in addition to its adapter. `digest`: its SHA-256."""

    name: str
    bytes: int
    digest: str
    created_at: datetime
