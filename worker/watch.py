"""What is known of a running child, and when it should be done."""

import time
from dataclasses import dataclass, field

from app.domain.adapters import Environment
from app.domain.attempts import Failed, Finished, Metrics
from worker.child import Child
from worker.device_reservation import TrainingReservation

PACE_UPDATES = 20
PLANNED_UPDATES = 5
"""How many seen updates the plan's pace weighs as much as: the first ones take longer, and their number is small."""

ENDING = 2.0
"""Seconds from the last update to the end of the child: writing a checkpoint and the adapter."""


@dataclass
class Watch:
    """One child's life as its supervisor sees it."""

    child: Child
    reservation: TrainingReservation
    planned: float | None
    """Seconds of an update by the plan, where it knows a pace."""

    batch: list[Metrics] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    first: tuple[int, float] | None = None
    flushed_at: float = field(default_factory=time.monotonic)
    asked: str | None = None
    kill_at: float | None = None
    last: Finished | Failed | None = None
    environment: Environment | None = None
    status: int = 0

    def heard(self, metrics: Metrics) -> None:
        """An update is done."""
        self.batch.append(metrics)
        self.recent = [*self.recent[1 - PACE_UPDATES :], metrics.seconds]
        self.first = self.first or (metrics.update, time.monotonic())

    def eta(self, last: Metrics) -> float:
        """Seconds of training that are left, by the recent updates' pace."""
        return round(sum(self.recent) / len(self.recent) * (last.total_updates - last.update), 1)

    def ends_in(self, last: Metrics) -> float:
        """Seconds until the child should be gone, by the clock on the wall: evaluations and checkpoints count."""
        update, at = self.first or (last.update, time.monotonic())
        spent, done = time.monotonic() - at, last.update - update
        if self.planned is not None:
            spent, done = spent + PLANNED_UPDATES * self.planned, done + PLANNED_UPDATES
        pace = spent / done if done else sum(self.recent) / len(self.recent)
        return pace * (last.total_updates - last.update) + ENDING
