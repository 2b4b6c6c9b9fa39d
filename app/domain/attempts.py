"""Messages between a supervisor and the child process that trains: a work order, commands and events.

The supervisor writes the work order to the child's stdin, then commands. The child writes events to its stdout. Each
line is one JSON object. The child's stderr is a log for people.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from app.domain.frozen import Frozen
from app.domain.plans import Schedule
from app.domain.specs import TrainSpec
from app.domain.splits import SplitName


class BaseOnDisk(Frozen):
    """A base model's directory on this host. It holds config.json, tokenizer.json and safetensors."""

    path: Path
    digest: str
    name: str
    revision: str
    fp16: Literal["safe", "unsafe", "unknown"] = "unknown"


class TrainOrder(Frozen):
    """The work order of a training child. The child opens no network connection and reads no other input.

    `rows`: file of `EncodedRow`s, as JSON lines. `directory`: of this attempt; the child writes `checkpoints/`,
    `adapter/` and `artifacts/` (files for the job's user) into it. `resume_from`: directory of the checkpoint to go on
    from. `start_from`: directory of a published adapter whose weights are the initial ones. `resident_limit`: resident
    bytes between micro-batches from which the heap's holes are returned to the system.
    """

    kind: Literal["train"] = "train"
    job_id: str
    epoch: int
    base: BaseOnDisk
    rows: Path
    directory: Path
    resume_from: Path | None
    start_from: Path | None = None
    spec: TrainSpec
    schedule: Schedule
    resident_limit: int = 0


class EncodedBranch(Frozen):
    """A continuation that branches off a trajectory after its first `at` tokens.

    `ids`: the continuation's token ids. `trained`: half-open spans of `ids` that carry a loss. `verdict`: index in
    `ids` of the verdict's first token, None without a verdict."""

    at: int
    ids: tuple[int, ...]
    trained: tuple[tuple[int, int], ...]
    verdict: int | None = None


class EncodedRow(Frozen):
    """One trajectory as token ids. Training learns only rows of the split `train`.

    `trained`: half-open spans of `ids` that carry a loss. `verdict`: index in `ids` of the verdict's first token.
    `branch`: the verdict branch, without the tokens that it shares with the trajectory."""

    line: int
    ids: tuple[int, ...]
    trained: tuple[tuple[int, int], ...]
    verdict: int | None = None
    branch: EncodedBranch | None = None
    part: SplitName = SplitName.TRAIN

    @property
    def all_ids(self) -> tuple[int, ...]:
        """The trajectory's ids, then the branch's."""
        return self.ids if self.branch is None else self.ids + self.branch.ids


class ChildCommand(Frozen):
    """`checkpoint`: write a checkpoint and continue. `pause`: write one and exit. `stop`: exit without one."""

    command: Literal["checkpoint", "stop", "pause"]


class TrainingStarted(Frozen):
    event: Literal["started"] = "started"
    precision: str
    device: str
    threads: int
    trainable_parameters: int
    total_parameters: int
    resumed_from_update: int = 0


class UpdateMetrics(Frozen):
    """One update. `loss`: mean over its labelled tokens, in which a verdict counts `verdict_weight` times.

    `tokens_per_second`: real tokens, without padding. `validation_…`: of the weights after this update, if they were
    evaluated.
    """

    event: Literal["metrics"] = "metrics"
    update: int
    total_updates: int
    epoch: float
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    tokens: int
    labelled_tokens: int
    tokens_per_second: float
    skipped: bool = False
    seconds: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    validation_verdict_accuracy: float | None = None


class EvaluationFinished(Frozen):
    """The validation or test rows were evaluated.

    `loss`: the same mean over their labelled tokens, None if it is not finite. `accuracy`: share of labelled tokens for
    which the model's most probable token is the right one. `verdict_accuracy`: the same of the verdicts behind the last
    Observation, without a Thought; None if no row has that branch. `best`: this loss is lower than all earlier ones.

    A validation is reported before its update's metrics. If a command interrupted it, it is reported after the resume.
    """

    event: Literal["evaluated"] = "evaluated"
    part: SplitName
    update: int
    rows: int
    loss: float | None
    accuracy: float
    verdict_accuracy: float | None = None
    best: bool = False
    seconds: float


class CheckpointWritten(Frozen):
    """A checkpoint directory is complete, hashed and at its final path.

    It also contains an adapter of the same weights. `packages`, `metrics` and `warnings` go into the manifest if that
    adapter is published."""

    event: Literal["checkpoint"] = "checkpoint"
    update: int
    path: Path
    digest: str
    validation_loss: float | None = None
    packages: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class LogMessage(Frozen):
    event: Literal["log"] = "log"
    level: Literal["info", "warning"] = "info"
    message: str
    data: dict[str, str | int | float | bool | None] = Field(default_factory=dict)


class TrainingFinished(Frozen):
    """The last event of a child that ended without an error. `adapter`: a PEFT directory; None unless it succeeded.

    `warnings`: reasons to doubt the adapter. The job and the adapter's manifest show them.
    """

    event: Literal["finished"] = "finished"
    outcome: Literal["succeeded", "paused", "stopped"]
    adapter: Path | None = None
    packages: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class TrainingFailed(Frozen):
    """The last event of a child that failed, in words for the user. Tracebacks go to stderr only."""

    event: Literal["failed"] = "failed"
    code: str
    message: str
    hint: str | None = None


ChildEvent = Annotated[
    TrainingStarted
    | UpdateMetrics
    | EvaluationFinished
    | CheckpointWritten
    | LogMessage
    | TrainingFinished
    | TrainingFailed,
    Field(discriminator="event"),
]
CHILD_EVENT: TypeAdapter[ChildEvent] = TypeAdapter(ChildEvent)
