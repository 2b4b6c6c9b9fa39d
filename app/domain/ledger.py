"""Words of the device ledger: reservations of one device by training and inference, and which of the two is suspended.

This module is pure. `app.db` has the rows and the clock. Sizes are in bytes, times in seconds.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from app.domain.frozen import Frozen

PolicySetting = Literal["auto", "yield", "exclusive"]
"""The operator's setting. `auto` shares the device if both fit."""


class Tenant(StrEnum):
    TRAINING = "training"
    INFERENCE = "inference"


class Policy(StrEnum):
    """What happens to inference while a job trains. `share`: both run. `yield`: inference is suspended, and other
    jobs may use the bytes that are left. `exclusive`: inference is suspended, and no other job runs on the device."""

    SHARE = "share"
    YIELD = "yield"
    EXCLUSIVE = "exclusive"


class Reservation(Frozen):
    """Bytes of a device that a tenant has. Only training sets `policy` and `job_id`. `ends_in`: expected seconds until
    the job ends, None if unknown."""

    tenant: Tenant
    bytes: int
    policy: Policy | None = None
    job_id: str | None = None
    ends_in: float | None = None


@dataclass(frozen=True, slots=True)
class OwnedReservation:
    """A reservation, the host of its device, and the process (`owner`) that renews it."""

    host: str
    owner: str
    reservation: Reservation


@dataclass(frozen=True, slots=True)
class TrainingGrant:
    """The ledger's answer to a job: its reservation, if it got one, and the tenants that still block it."""

    reservation: OwnedReservation | None
    policy: Policy
    blocked_by: frozenset[Tenant]


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why inference may not use its device, and in how many seconds to ask again (None if unknown)."""

    reason: str
    retry_after: float | None


def inference_bytes(asked: int | None, device: int) -> int:
    """Bytes that inference may use of a device: the operator's setting, else half. Half of 16 GB holds a 4-bit model of
    7 billion weights with its adapters. The other half trains such a model with gradient checkpointing."""
    return device // 2 if asked is None else asked


def policy_for(setting: PolicySetting, wanted: int | None, others: int, device: int) -> Policy:
    """The policy for a job that takes `wanted` bytes (None: unknown). `others`: bytes that all other tenants use."""
    if setting == "exclusive":
        return Policy.EXCLUSIVE
    if setting == "yield" or wanted is None or wanted + others > device:
        return Policy.YIELD
    return Policy.SHARE


def bytes_to_reserve(policy: Policy, wanted: int | None, device: int) -> int:
    """Bytes that a job reserves. Never more than the device has: a plan may exceed what the job really takes."""
    return device if wanted is None or policy is Policy.EXCLUSIVE else min(wanted, device)


def why_unavailable(others: list[Reservation], room: int | None) -> Unavailable | None:
    """Why inference is suspended while these tenants have the device; None if it may run. `room`: the most bytes that
    jobs may use; None skips that check, for an inference that has its reservation already."""
    jobs = [other for other in others if other.tenant is Tenant.TRAINING]
    crowded = room is not None and sum(job.bytes for job in jobs) > room
    blocking = [job for job in jobs if crowded or job.policy is not Policy.SHARE]
    if not blocking:
        return None
    names = " and ".join(str(job.job_id) for job in blocking)
    known = [job.ends_in for job in blocking if job.ends_in is not None]
    return Unavailable(f"inference is suspended while a job trains ({names})", max(0.0, *known) if known else None)
