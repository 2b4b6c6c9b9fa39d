"""Progress of a running child: metrics that wait to be written, its pace, and when it should end."""

import time
from dataclasses import dataclass, field

from app.domain.attempts import TrainingFailed, TrainingFinished, UpdateMetrics
from worker.device_reservation import TrainingReservation

PACE_UPDATES = 20
PLANNED_UPDATES = 5
"""The plan's pace weighs as much as so many measured updates: the first updates are slow and few."""

ENDING = 2.0
"""Seconds from the last update to the end of the child, which writes a checkpoint and the adapter then."""


@dataclass
class Watch:
    """One child. `asked`: the command that it got. `kill_at`: when to kill it. `status`: its exit status."""

    reservation: TrainingReservation
    planned: float | None
    """Seconds per update by the plan, if known."""

    batch: list[UpdateMetrics] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    first: tuple[int, float] | None = None
    flushed_at: float = field(default_factory=time.monotonic)
    asked: str | None = None
    kill_at: float | None = None
    last: TrainingFinished | TrainingFailed | None = None
    status: int = 0

    def add(self, metrics: UpdateMetrics) -> None:
        """Take in one update's metrics."""
        self.batch.append(metrics)
        self.recent = [*self.recent[1 - PACE_UPDATES :], metrics.seconds]
        self.first = self.first or (metrics.update, time.monotonic())

    def eta(self, last: UpdateMetrics) -> float:
        """Seconds of training left, by the pace of recent updates."""
        return round(sum(self.recent) / len(self.recent) * (last.total_updates - last.update), 1)

    def ends_in(self, last: UpdateMetrics) -> float:
        """Seconds until the child should end, by wall-clock time: with evaluations and checkpoints."""
        update, at = self.first or (last.update, time.monotonic())
        spent, done = time.monotonic() - at, last.update - update
        if self.planned is not None:
            spent, done = spent + PLANNED_UPDATES * self.planned, done + PLANNED_UPDATES
        pace = spent / done if done else sum(self.recent) / len(self.recent)
        return pace * (last.total_updates - last.update) + ENDING
