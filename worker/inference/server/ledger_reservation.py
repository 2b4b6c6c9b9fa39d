"""The engine's place on this host's device, kept in the ledger."""

import threading
import time

from app.composition import Services
from app.domain.ledger import Unavailable, inference_bytes
from worker.device import describe_device

RENEWALS = 4
"""Renewals within a lease; in between the ledger is only read."""


class LedgerReservation:
    """Reserves `bytes`. The owner is named by its port, so that a front goes on with the row of one that was killed."""

    def __init__(self, services: Services) -> None:
        settings = services.settings
        self.bytes = inference_bytes(settings.inference_memory, describe_device(()).bytes)
        self._ledger = services.ledger
        self._host = settings.host_name
        self._owner = f"{self._host}:inference:{settings.inference_port}"
        self._renew_at = 0.0
        self.lease = self._ledger.inference_lease * (1 - 1 / RENEWALS)  # since a stay that renewed nothing
        # A thread outlives the task that waited for it: it must not reserve behind `leave`.
        self._asking = threading.Lock()

    def stay(self) -> Unavailable | None:
        """Raises VerituneError when the database is away."""
        with self._asking:
            absence = self._ledger.inference_unavailable(self._host)
            if absence is None and time.monotonic() >= self._renew_at:
                absence = self._ledger.reserve_for_inference(self._host, self._owner, self.bytes)
                self._renew_at = time.monotonic() + self._ledger.inference_lease / RENEWALS
            if absence is not None:
                self._renew_at = 0.0
            return absence

    def leave(self) -> None:
        """Raises VerituneError when the database is away; the reservation then runs out."""
        with self._asking:
            self._ledger.release(self._host, self._owner)
            self._renew_at = 0.0
