"""The device ledger: training and inference of one host reserve bytes of the device that they share.

One transaction decides and reserves, so no byte is reserved twice. A reservation is a lease: if its process is killed
and renews it no more, it expires.
"""

from app.db import Database, Unit
from app.domain.devices import NamedDevice
from app.domain.ledger import (
    OwnedReservation,
    Policy,
    PolicySetting,
    Reservation,
    Tenant,
    TrainingGrant,
    Unavailable,
    bytes_to_reserve,
    inference_bytes,
    policy_for,
    why_unavailable,
)

LEAST_LEASE = 10.0
"""The shortest lease of inference, in seconds: longer than its engine takes to stop after the last renewal."""


class Ledger:
    def __init__(
        self, database: Database, setting: PolicySetting, inference_memory: int | None, lease_seconds: float
    ) -> None:
        self._database = database
        self._setting = setting
        self._inference_memory = inference_memory
        self._lease_seconds = lease_seconds
        self.inference_lease = max(lease_seconds, LEAST_LEASE)

    # For training.

    def reserve_for_training(
        self, host: str, owner: str, job_id: str, wanted: int | None, device: int, seconds: float | None = None
    ) -> TrainingGrant:
        """Reserve `wanted` bytes (None: unknown) for a job, on a device of `device` bytes. The job should end `seconds`
        after it begins.

        Call it again until nothing blocks the job. If another job blocks it, nothing is reserved. If inference blocks
        it, the bytes are reserved first, because the reservation is what suspends inference.
        """
        with self._database.write() as unit:
            unit.reservations.lock(host)
            others = [owned.reservation for owned in unit.reservations.list_by_host(host) if owned.owner != owner]
            jobs = sum(other.bytes for other in others if other.tenant is Tenant.TRAINING)
            policy = policy_for(self._setting, wanted, jobs + self._inference_bytes(others, device), device)
            size = bytes_to_reserve(policy, wanted, device)
            if jobs and jobs + size > device:
                unit.reservations.drop(host, owner)
                return TrainingGrant(None, policy, frozenset({Tenant.TRAINING}))
            owned = OwnedReservation(
                host, owner, Reservation(tenant=Tenant.TRAINING, bytes=size, policy=policy, job_id=job_id)
            )
            unit.reservations.put(owned, self._lease_seconds)
            if seconds is not None:  # in the same transaction: inference reads both for its Retry-After
                unit.reservations.set_expected_end(host, owner, seconds)
            serving = any(other.tenant is Tenant.INFERENCE for other in others)
            blocks = serving and policy is not Policy.SHARE
            return TrainingGrant(owned, policy, frozenset({Tenant.INFERENCE} if blocks else ()))

    def set_expected_end(self, owned: OwnedReservation, seconds: float | None) -> None:
        """Write in how many seconds the job should end."""
        with self._database.write() as unit:
            unit.reservations.set_expected_end(owned.host, owned.owner, seconds)

    def release(self, host: str, owner: str) -> None:
        """Delete this process's reservation, if it has one."""
        with self._database.write() as unit:
            unit.reservations.drop(host, owner)

    # For inference.

    def reserve_for_inference(self, host: str, owner: str, wanted: int) -> Unavailable | None:
        """Reserve `wanted` bytes for an engine, or renew them. If it must not run, return why and change nothing."""
        with self._database.write() as unit:
            unit.reservations.lock(host)
            others = [owned.reservation for owned in unit.reservations.list_by_host(host) if owned.owner != owner]
            unavailable = why_unavailable(others, _bytes_for_jobs(unit, host, wanted))
            if unavailable is None:
                mine = Reservation(tenant=Tenant.INFERENCE, bytes=wanted)
                unit.reservations.put(OwnedReservation(host, owner, mine), self.inference_lease)
            return unavailable

    def inference_unavailable(self, host: str) -> Unavailable | None:
        """Why an engine with a reservation must stop; None if it may go on."""
        with self._database.read() as unit:
            return why_unavailable([owned.reservation for owned in unit.reservations.list_by_host(host)], None)

    # For plans and for views.

    def policy_for(self, host: str, wanted: int | None, device: int) -> Policy:
        """The policy for a job on this host's device, if no other job trains there."""
        with self._database.read() as unit:
            others = [owned.reservation for owned in unit.reservations.list_by_host(host)]
        return policy_for(self._setting, wanted, self._inference_bytes(others, device), device)

    def by_host(self) -> dict[str, tuple[Reservation, ...]]:
        """Host → the reservations of its device now."""
        with self._database.read() as unit:
            found = unit.reservations.list_all()
        return {
            host: tuple(owned.reservation for owned in found if owned.host == host) for host in {h.host for h in found}
        }

    def inference_is_suspended(self) -> bool:
        """Whether inference is suspended because a job trains, on any host."""
        with self._database.read() as unit:
            return why_unavailable([owned.reservation for owned in unit.reservations.list_all()], None) is not None

    def _inference_bytes(self, others: list[Reservation], device: int) -> int:
        """Bytes that inference has reserved, or will reserve when it resumes."""
        serving = sum(other.bytes for other in others if other.tenant is Tenant.INFERENCE)
        return serving or inference_bytes(self._inference_memory, device)


def _bytes_for_jobs(unit: Unit, host: str, wanted: int) -> int | None:
    """The most bytes that jobs may use in addition to `wanted`, by the device size that the workers report."""
    devices = (NamedDevice.model_validate({"name": row.name, **row.description}) for row in unit.devices.list_devices())
    known = [device.bytes for device in devices if device.host == host and "gpu" in device.queues]
    return min(known) - wanted if known else None
