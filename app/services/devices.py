"""Devices: workers report them, and plans read what their job would run on."""

from datetime import UTC, datetime, timedelta

from app.db import Database
from app.domain.devices import CARDS, Device, DeviceDescription, NamedDevice
from app.domain.errors import InvalidError, Problem
from app.domain.spelling import did_you_mean
from app.services.ledger import Ledger

ONLINE = timedelta(seconds=60)


class Devices:
    def __init__(self, database: Database, ledger: Ledger) -> None:
        self._database = database
        self._ledger = ledger

    def report(self, name: str, description: DeviceDescription) -> None:
        """Upsert a worker's device. Paces that earlier reports measured remain."""
        with self._database.write() as unit:
            known = {row.name: row.description for row in unit.devices.list_devices()}
            paces = known.get(name, {}).get("tokens_per_second", {}) | description.tokens_per_second
            merged = description.model_copy(update={"tokens_per_second": paces})
            unit.devices.put(name, merged.model_dump(mode="json"))

    def measured(self, name: str, served_base: str, tokens_per_second: float) -> None:
        """Record a job's pace over a served base, if this worker has reported its device."""
        with self._database.write() as unit:
            known = {row.name: row.description for row in unit.devices.list_devices()}
            if name in known:
                described = DeviceDescription.model_validate(known[name])
                paces = described.tokens_per_second | {served_base: round(tokens_per_second, 1)}
                unit.devices.put(name, known[name] | {"tokens_per_second": paces})

    def find(self, name: str) -> Device | None:
        return next((device for device in self.list_devices() if device.name == name), None)

    def named(self, name: str) -> NamedDevice:
        """The device of that name, or the card of that kind. Raises InvalidError if there is neither."""
        found = self.find(name) or CARDS.get(name)
        if found is None:
            known = [*(device.name for device in self.list_devices()), *CARDS]
            hint = did_you_mean(name, known) or ""
            problem = Problem(("query", "device"), f"no worker reported {name!r}, and no card has that name", hint)
            raise InvalidError(f"the device {name!r} is not known; {hint}", code="unknown_device", problems=(problem,))
        return found

    def list_devices(self) -> list[Device]:
        now = datetime.now(UTC)
        with self._database.read() as unit:
            rows = unit.devices.list_devices()
        return [
            Device(name=row.name, last_seen=row.last_seen, online=now - row.last_seen < ONLINE, **row.description)
            for row in rows
        ]

    def served_on(self, host: str) -> set[str]:
        """The queues that the online workers of a host serve."""
        return {
            queue for device in self.list_devices() if device.host == host and device.online for queue in device.queues
        }

    def list_devices_with_reservations(self) -> list[Device]:
        """All devices, each with its reservations."""
        reserved = self._ledger.by_host()
        return [
            device.model_copy(update={"reservations": reserved.get(device.host, ())})
            if "gpu" in device.queues
            else device
            for device in self.list_devices()
        ]

    def room(self, name: str) -> int | None:
        """Unreserved bytes of a worker's memory. None on a GPU, where a waiting process takes none, and for an unknown
        worker."""
        device = self.find(name)
        if device is None or device.type == "gpu":
            return None
        return device.bytes - sum(one.bytes for one in self._ledger.by_host().get(device.host, ()))

    def trainer(self) -> Device | None:
        """The device that a training job would run on: an online one that serves the gpu queue."""
        fitting = [device for device in self.list_devices() if "gpu" in device.queues]
        return next((device for device in fitting if device.online), fitting[0] if fitting else None)
