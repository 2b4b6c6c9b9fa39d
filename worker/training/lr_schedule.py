"""The learning rate of each update. Pure arithmetic."""

import math

from app.domain.plans import Schedule
from app.domain.specs import Trainer


def learning_rate(applied: int, schedule: Schedule, trainer: Trainer) -> float:
    """The rate for the next update when `applied` ones have changed the weights: a skipped one holds it.

    It rises over the warm-up to the full rate, then falls towards zero, which the last update does not reach.
    """
    warmup = schedule.warmup_updates
    if applied < warmup:
        return trainer.learning_rate * (applied + 1) / warmup
    share = min(1.0, (applied - warmup) / max(1, schedule.updates - warmup))
    factors = {"cosine": (1 + math.cos(math.pi * share)) / 2, "linear": 1 - share, "constant": 1.0}
    return trainer.learning_rate * factors[trainer.learning_rate_scheduler.decay]
