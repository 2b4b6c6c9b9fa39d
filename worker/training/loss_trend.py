"""Whether a run learned: its last losses against its first ones. Pure arithmetic."""

from collections.abc import Sequence
from statistics import fmean

FEWEST, MOST = 3, 50
"""Losses that a mean is made of: a tenth of the run's updates, within these bounds."""

CLIP = 1.25
"""A first loss counts as at most this multiple of the very first: a run may diverge within its first updates."""

MARGIN = 1.05
"""The last losses must be above the first ones by this factor: neighbouring updates differ by noise alone."""


def window(updates: int) -> int:
    """How many losses each mean is made of, in a run of `updates` updates."""
    return min(MOST, max(FEWEST, updates // 10))


def add_loss(
    first: tuple[float, ...], last: tuple[float, ...], loss: float, updates: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(`first`, `last`) with the loss of one more update."""
    count = window(updates)
    return (*first, loss)[:count], (*last, loss)[-count:]


def warning(first: Sequence[float], last: Sequence[float], applied: int) -> str | None:
    """What is wrong with a run of `applied` updates whose loss ends above where it began, else None."""
    count = min(len(first), max(1, applied // 2))  # both ends of a short run have updates of their own
    if applied < 2 or not count:
        return None
    began, ended = fmean(min(loss, CLIP * first[0]) for loss in first[:count]), fmean(last[-count:])
    if ended <= MARGIN * began:
        return None
    return (
        f"the loss rose: {began:.2f} over the first updates, {ended:.2f} over the last ones; the adapter is probably "
        "worse than its base. Lower trainer.learning_rate"
    )
