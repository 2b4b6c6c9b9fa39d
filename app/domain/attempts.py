"""One worker's go at a job: the order it gets, the commands it hears, the events it tells.

A work order goes down the child's stdin first, and commands after it; events come up its stdout. One JSON object a
line; stderr is for people.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from app.domain.frozen import Frozen
from app.domain.plans import Schedule
from app.domain.specs import TrainSpec
from app.domain.splits import SplitName


class BaseOnDisk(Frozen):
    """A base model's directory on this host: config.json, tokenizer.json and safetensors."""

    path: Path
    digest: str
    name: str
    revision: str
    fp16: Literal["safe", "unsafe", "unknown"] = "unknown"


class TrainOrder(Frozen):
    """All that a training child needs. It opens no network connection and reads nothing else.

    `rows`: JSON lines of `EncodedRow`. `directory`: the attempt's own; the child writes `checkpoints/`, `adapter/` and
    `artifacts/`, files that the job's user may have, there. `resume_from`: a checkpoint directory that an earlier
    attempt committed. `start_from`: the directory of a published adapter whose weights are the first.
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


class EncodedBranch(Frozen):
    """A continuation that leaves a trajectory behind its first `at` tokens: its own ids, and the half-open spans of
    those that carry a loss."""

    at: int
    ids: tuple[int, ...]
    trained: tuple[tuple[int, int], ...]


class EncodedRow(Frozen):
    """One trajectory as the child reads it: token ids, the half-open spans of them that carry a loss, and the verdict
    branch where it has one. The tokens that both share stand here once. Only rows of the part `train` are learned."""

    line: int
    ids: tuple[int, ...]
    trained: tuple[tuple[int, int], ...]
    branch: EncodedBranch | None = None
    part: SplitName = SplitName.TRAIN

    @property
    def all_ids(self) -> tuple[int, ...]:
        """The trajectory's ids and behind them the branch's own."""
        return self.ids if self.branch is None else self.ids + self.branch.ids


class ChildCommand(Frozen):
    """`checkpoint`: write one now and go on. `stop`: leave without one. `pause`: write one and leave."""

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
    """One update. `loss` is the mean over its labelled tokens; `tokens_per_second` counts real tokens, no padding.

    `validation_loss` and `validation_accuracy` are those of the weights behind it, where they were evaluated.
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


class EvaluationFinished(Frozen):
    """Held-out rows were looked at. `loss` is the mean over their labelled tokens, None where it is not finite;
    `accuracy` the share of those tokens that the model would have written; `best`: no earlier loss was as low.

    A validation comes before its update's metrics, unless a command cut it short: then it comes after a resume.
    """

    event: Literal["evaluated"] = "evaluated"
    part: SplitName
    update: int
    rows: int
    loss: float | None
    accuracy: float
    best: bool = False
    seconds: float


class CheckpointWritten(Frozen):
    """A checkpoint directory is complete, hashed and in place. It holds an adapter of the same weights beside them:
    `packages`, `metrics` and `warnings` are what its manifest says, should it be published."""

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
    """The last event of a good end. `adapter`: a PEFT directory, when the work was finished and not just stopped.

    `warnings`: what speaks against the adapter; they stand on the job and in the adapter's manifest.
    """

    event: Literal["finished"] = "finished"
    outcome: Literal["succeeded", "paused", "stopped"]
    adapter: Path | None = None
    packages: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class TrainingFailed(Frozen):
    """The last event of a bad end, in words for the user. A traceback goes to stderr, never here."""

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
