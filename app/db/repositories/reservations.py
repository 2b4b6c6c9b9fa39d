"""Reservations of devices: rows with a lease, by the database's clock."""

from typing import Any

from sqlalchemy import Row, Select, delete, func, select, update
from sqlalchemy.orm import Session

from app.db.base import clock
from app.db.repositories.rows import insert_into
from app.db.tables import ReservationRow
from app.domain.ledger import OwnedReservation, Policy, Reservation, Tenant

_LIVE = ReservationRow.lease_until >= clock()
_COLUMNS: Select[*tuple[Any, ...]] = select(
    ReservationRow.host,
    ReservationRow.owner,
    ReservationRow.tenant,
    ReservationRow.bytes,
    ReservationRow.policy,
    ReservationRow.job_id,
    (ReservationRow.expected_until - clock()).label("ends_in"),
).where(_LIVE)


class Reservations:
    def __init__(self, session: Session) -> None:
        self._session = session

    def lock(self, host: str) -> None:
        """Lock this host's device until the unit ends, and delete what expired.

        SQLite has one writer at a time. On Postgres, two units that read first would both find the bytes free.
        """
        if self._session.get_bind().dialect.name == "postgresql":
            self._session.execute(select(func.pg_advisory_xact_lock(func.hashtext(host))))
        self._session.execute(delete(ReservationRow).where(ReservationRow.host == host, ~_LIVE))

    def list_by_host(self, host: str) -> list[OwnedReservation]:
        """The reservations of one host that have not expired."""
        return [_to_reservation(row) for row in self._session.execute(_COLUMNS.where(ReservationRow.host == host))]

    def list_all(self) -> list[OwnedReservation]:
        wanted = _COLUMNS.order_by(ReservationRow.host, ReservationRow.tenant, ReservationRow.owner)
        return [_to_reservation(row) for row in self._session.execute(wanted)]

    def put(self, owned: OwnedReservation, seconds: float) -> None:
        """Reserve or renew: the lease ends `seconds` from now. The expected end of the job does not change."""
        reservation = owned.reservation
        fresh = insert_into(self._session, ReservationRow).values(
            host=owned.host,
            owner=owned.owner,
            tenant=reservation.tenant.value,
            bytes=reservation.bytes,
            policy=reservation.policy and reservation.policy.value,
            job_id=reservation.job_id,
            lease_until=clock() + seconds,
        )
        names = ("tenant", "bytes", "policy", "job_id", "lease_until")
        replaced = {name: fresh.excluded[name] for name in names}
        self._session.execute(fresh.on_conflict_do_update(index_elements=["host", "owner"], set_=replaced))

    def set_expected_end(self, host: str, owner: str, seconds: float | None) -> None:
        """The job should end `seconds` from now."""
        until = None if seconds is None else clock() + seconds
        self._session.execute(update(ReservationRow).where(*_key(host, owner)).values(expected_until=until))

    def drop(self, host: str, owner: str) -> None:
        self._session.execute(delete(ReservationRow).where(*_key(host, owner)))


def _key(host: str, owner: str) -> tuple[Any, ...]:
    return ReservationRow.host == host, ReservationRow.owner == owner


def _to_reservation(row: Row[*tuple[Any, ...]]) -> OwnedReservation:
    reservation = Reservation(
        tenant=Tenant(row.tenant),
        bytes=row.bytes,
        policy=row.policy and Policy(row.policy),
        job_id=row.job_id,
        ends_in=None if row.ends_in is None else max(0.0, round(row.ends_in, 1)),  # it may take longer than expected
    )
    return OwnedReservation(row.host, row.owner, reservation)
