"""The device ledger: trainer and inference of one host reserve bytes of the device they share, for a lease at a time.

Deciding and reserving is one transaction, so bytes that are there once are given once. A reservation that is not
renewed runs out, and with it the claim of a process that was killed.
"""

from app.db import Database, Unit
from app.domain.devices import NamedDevice
from app.domain.ledger import (
    Absence,
    Held,
    Policy,
    Reservation,
    Standing,
    Tenant,
    Wish,
    absence_for,
    bytes_of,
    inference_bytes,
    policy_of,
)

LEAST_LEASE = 10.0
"""Seconds for which inference reserves at least: longer than it takes to end its engine, when it renews nothing."""


class Ledger:
    def __init__(self, database: Database, wish: Wish, inference_memory: int | None, lease_seconds: float) -> None:
        self._database = database
        self._wish = wish
        self._inference_memory = inference_memory
        self._lease_seconds = lease_seconds
        self.inference_lease = max(lease_seconds, LEAST_LEASE)

    # What a trainer does.

    def train(
        self, host: str, owner: str, job_id: str, wanted: int | None, device: int, seconds: float | None = None
    ) -> Standing:
        """Ask for a place for a job that takes `wanted` bytes (None: not known) of a device of `device` bytes, and
        should be done in `seconds` once it has its place.

        Asked again until nobody is in the way. Another job is waited for before anything is reserved; inference
        afterwards, for the reservation is what tells it to make way.
        """
        with self._database.write() as unit:
            unit.reservations.hold(host)
            others = [held.reservation for held in unit.reservations.of(host) if held.owner != owner]
            jobs = sum(other.bytes for other in others if other.tenant is Tenant.TRAINING)
            policy = policy_of(self._wish, wanted, jobs + self._serving(others, device), device)
            size = bytes_of(policy, wanted, device)
            if jobs and jobs + size > device:
                unit.reservations.drop(host, owner)
                return Standing(None, policy, frozenset({Tenant.TRAINING}))
            held = Held(host, owner, Reservation(tenant=Tenant.TRAINING, bytes=size, policy=policy, job_id=job_id))
            unit.reservations.put(held, self._lease_seconds)
            if seconds is not None:  # at once: whoever sees the reservation tells people when to come back
                unit.reservations.expect(host, owner, seconds)
            serving = any(other.tenant is Tenant.INFERENCE for other in others)
            in_the_way = serving and policy is not Policy.SHARE
            return Standing(held, policy, frozenset({Tenant.INFERENCE} if in_the_way else ()))

    def expect(self, held: Held, seconds: float | None) -> None:
        """Say in how many seconds the job should be done."""
        with self._database.write() as unit:
            unit.reservations.expect(held.host, held.owner, seconds)

    def release(self, host: str, owner: str) -> None:
        """Give back what this process has there, if it has anything."""
        with self._database.write() as unit:
            unit.reservations.drop(host, owner)

    # What inference does.

    def serve(self, host: str, owner: str, wanted: int) -> Absence | None:
        """Reserve `wanted` bytes for an engine, or renew them; or why it must not be there: then nothing changes."""
        with self._database.write() as unit:
            unit.reservations.hold(host)
            others = [held.reservation for held in unit.reservations.of(host) if held.owner != owner]
            absence = absence_for(others, _room(unit, host, wanted))
            if absence is None:
                mine = Reservation(tenant=Tenant.INFERENCE, bytes=wanted)
                unit.reservations.put(Held(host, owner, mine), self.inference_lease)
            return absence

    def absence(self, host: str) -> Absence | None:
        """Why an engine that has its place must leave it; None when it may stay."""
        with self._database.read() as unit:
            return absence_for([held.reservation for held in unit.reservations.of(host)], None)

    # What people and plans look at.

    def policy(self, host: str, wanted: int | None, device: int) -> Policy:
        """How a job would meet inference on this host's device, were it the only one that trains."""
        with self._database.read() as unit:
            others = [held.reservation for held in unit.reservations.of(host)]
        return policy_of(self._wish, wanted, self._serving(others, device), device)

    def by_host(self) -> dict[str, tuple[Reservation, ...]]:
        """Host → what is reserved of its device now."""
        with self._database.read() as unit:
            found = unit.reservations.all()
        return {
            host: tuple(held.reservation for held in found if held.host == host) for host in {h.host for h in found}
        }

    def makes_way(self) -> bool:
        """Whether inference is away because a job trains, here or on another host."""
        with self._database.read() as unit:
            return absence_for([held.reservation for held in unit.reservations.all()], None) is not None

    def _serving(self, others: list[Reservation], device: int) -> int:
        """What inference has, or where it has nothing now, what it will want when it comes back."""
        serving = sum(other.bytes for other in others if other.tenant is Tenant.INFERENCE)
        return serving or inference_bytes(self._inference_memory, device)


def _room(unit: Unit, host: str, wanted: int) -> int | None:
    """Bytes that jobs may have beside so many, by what this host's trainers say of the device."""
    devices = (NamedDevice.model_validate({"name": row.name, **row.description}) for row in unit.devices.all())
    known = [device.bytes for device in devices if device.host == host and "gpu" in device.queues]
    return min(known) - wanted if known else None
