"""The doorbell's interface, and the queue of each kind of job."""

from typing import Protocol

from app.domain.specs import JobKind

QUEUES: dict[JobKind, str] = {
    JobKind.TRAIN: "gpu",
    JobKind.EXPORT: "gpu",
    JobKind.EVALUATE: "cpu",
    JobKind.SYNTHESIZE: "cpu",
    JobKind.REGROUND: "cpu",
    JobKind.DISTILL: "cpu",
}
"""Job kind → the queue whose workers run it: `gpu` needs tensors, `cpu` predicts or reads a corpus."""


def kinds_of(queues: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of job that a worker of these queues may run."""
    return tuple(kind.value for kind, queue in QUEUES.items() if queue in queues)


class Doorbell(Protocol):
    def ring(self, job_id: str, kind: JobKind) -> bool:
        """Tell workers that a committed job waits. False if the message was not sent: a worker's poll finds the job."""
