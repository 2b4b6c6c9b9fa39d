"""How many predictions run at once: so many, of which a crowd at one model leaves some to others."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from app.domain.errors import BusyError

KEPT_FOR_OTHERS = 4
"""One part in so many of the slots that a crowd at one model leaves free."""


class Slots:
    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = Lock()
        self._taken = 0
        self._by_model: Counter[str] = Counter()

    @contextmanager
    def slot(self, models: set[str]) -> Iterator[None]:
        """One slot for as long as the block lasts, counted at each of the models. BusyError where none is free."""
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
            most = self._most - self._most // KEPT_FOR_OTHERS
            if any(self._by_model[model] >= most for model in models):
                raise _busy(f"{most} predictions by this model run already; the other slots are for others")
            self._taken += 1
            self._by_model += Counter(models)


def _busy(why: str) -> BusyError:
    return BusyError(f"{why}; try again", code="predictions_busy", retry_after=2)
