"""Limits how many predictions run at once. One model cannot take all slots."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from app.domain.errors import BusyError

RESERVED_FRACTION = 4
"""One slot in so many is reserved: a single model cannot take it."""


class Slots:
    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = Lock()
        self._taken = 0
        self._by_model: Counter[str] = Counter()

    @contextmanager
    def slot(self, models: set[str]) -> Iterator[None]:
        """Take one slot while the block runs, and count it for each of the models. Raises BusyError if none is free."""
        self._take(models)
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1
                self._by_model -= Counter(models)

    def _take(self, models: set[str]) -> None:
        with self._lock:
            if self._taken >= self._most:
                raise _busy("all prediction slots are taken")
            most = self._most - self._most // RESERVED_FRACTION
            if any(self._by_model[model] >= most for model in models):
                raise _busy(f"{most} predictions by this model run already; the other slots are for others")
            self._taken += 1
            self._by_model += Counter(models)


def _busy(why: str) -> BusyError:
    return BusyError(f"{why}; try again", code="predictions_busy", retry_after=2)
