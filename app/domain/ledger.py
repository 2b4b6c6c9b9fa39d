"""The device ledger's words: what trainer and inference reserve of a device they share, and who makes way for whom.

Pure: rows and clocks are `app.db`'s. Bytes are bytes, times are seconds.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict

Wish = Literal["auto", "yield", "exclusive"]
"""What the operator wants: `auto` lets both stay where both fit."""


class Tenant(StrEnum):
    TRAINING = "training"
    INFERENCE = "inference"


class Policy(StrEnum):
    """How inference fares while a job trains. `share`: both stay. `yield`: inference's engine ends, and other trainers
    may have what the job leaves. `exclusive`: it ends, and the job has the device to itself."""

    SHARE = "share"
    YIELD = "yield"
    EXCLUSIVE = "exclusive"


class Reservation(BaseModel):
    """Bytes of a device that a tenant has. `policy` and `job_id`: of training. `ends_in`: seconds until a job should be
    done, None where that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: Tenant
    bytes: int
    policy: Policy | None = None
    job_id: str | None = None
    ends_in: float | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """A reservation with whose it is: the device's host, and the process (`owner`) that renews it."""

    host: str
    owner: str
    reservation: Reservation


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job stands that asked for a place: what it has, and which tenants are still in its way."""

    held: Held | None
    policy: Policy
    waits_for: frozenset[Tenant]


@dataclass(frozen=True, slots=True)
class Absence:
    """Why inference has to be away, and for how many seconds, as far as that is known."""

    why: str
    seconds: float | None


def inference_bytes(asked: int | None, device: int) -> int:
    """What inference may take of a device: what the operator says, else half. Of 16 GB that is a model of 7 billion
    weights in 4 bits with its adapters, beside which such a one can be trained where activations are recomputed."""
    return device // 2 if asked is None else asked


def policy_of(wish: Wish, wanted: int | None, beside: int, device: int) -> Policy:
    """How a job that takes `wanted` bytes (None: not known) meets inference. `beside`: what all others take with it."""
    if wish == "exclusive":
        return Policy.EXCLUSIVE
    if wish == "yield" or wanted is None or wanted + beside > device:
        return Policy.YIELD
    return Policy.SHARE


def bytes_of(policy: Policy, wanted: int | None, device: int) -> int:
    """What a job reserves: never more than there is, for a plan may be larger than what it turns out to take."""
    return device if wanted is None or policy is Policy.EXCLUSIVE else min(wanted, device)


def absence_for(others: list[Reservation], room: int | None) -> Absence | None:
    """Why inference cannot be beside these tenants; None when it can. `room`: bytes the jobs must leave, None where
    that was settled before."""
    jobs = [other for other in others if other.tenant is Tenant.TRAINING]
    crowded = room is not None and sum(job.bytes for job in jobs) > room
    in_the_way = [job for job in jobs if crowded or job.policy is not Policy.SHARE]
    if not in_the_way:
        return None
    names = " and ".join(str(job.job_id) for job in in_the_way)
    known = [job.ends_in for job in in_the_way if job.ends_in is not None]
    return Absence(f"inference makes way for training ({names})", max(0.0, *known) if known else None)
