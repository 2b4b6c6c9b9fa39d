"""Devices: rows that workers upsert, so that a plan knows what its job would run on."""

from datetime import UTC, datetime, timedelta

from app.db import Database
from app.domain.devices import Device, DeviceDescription

ONLINE = timedelta(seconds=60)


class Devices:
    def __init__(self, database: Database) -> None:
        self._database = database

    def report(self, name: str, description: DeviceDescription) -> None:
        """Say that this host is here. Measured paces of earlier reports are kept."""
        with self._database.write() as unit:
            known = {row.name: row.description for row in unit.devices.all()}
            paces = known.get(name, {}).get("tokens_per_second", {}) | description.tokens_per_second
            merged = description.model_copy(update={"tokens_per_second": paces})
            unit.devices.put(name, merged.model_dump(mode="json"))

    def all(self) -> list[Device]:
        now = datetime.now(UTC)
        with self._database.read() as unit:
            rows = unit.devices.all()
        return [
            Device(name=row.name, last_seen=row.last_seen, online=now - row.last_seen < ONLINE, **row.description)
            for row in rows
        ]

    def trainer(self) -> Device | None:
        """The device a training job would run on: an online one that serves the gpu queue."""
        fitting = [device for device in self.all() if "gpu" in device.queues]
        return next((device for device in fitting if device.online), fitting[0] if fitting else None)
