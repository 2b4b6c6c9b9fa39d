"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable


def until(check: Callable[[], bool], seconds: float = 60.0) -> float:
    """Seconds that it took; the test fails where it does not happen in time."""
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - began
