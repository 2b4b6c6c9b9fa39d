"""Short units of work over one engine: a `Unit` holds the repositories of one transaction.

No unit is held across generation, upload or streaming. On SQLite a writing transaction opens with BEGIN IMMEDIATE,
because a read that becomes a write fails with SQLITE_BUSY at once, whatever the timeout.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DataError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from app.db.repositories.adapters import Adapters
from app.db.repositories.artifacts import Artifacts
from app.db.repositories.blob_references import BlobReferences
from app.db.repositories.evaluation_answers import EvaluationAnswers
from app.db.repositories.jobs import Jobs
from app.db.repositories.keys import IdempotencyKeys
from app.db.repositories.predictions import Predictions
from app.db.repositories.reservations import Reservations
from app.db.repositories.resources import Aliases, BaseModels, Corpora, Datasets, Devices, Encodings
from app.db.repositories.rows import WRITES
from app.disk import disk_error
from app.domain.errors import InvalidError, StorageError, UnavailableError

POOL_SIZE = 48
"""Connections: at least as many as request threads, so that no thread waits for a connection."""


class Unit:
    """The repositories of one transaction."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @cached_property
    def datasets(self) -> Datasets:
        return Datasets(self.session)

    @cached_property
    def corpora(self) -> Corpora:
        return Corpora(self.session)

    @cached_property
    def base_models(self) -> BaseModels:
        return BaseModels(self.session)

    @cached_property
    def devices(self) -> Devices:
        return Devices(self.session)

    @cached_property
    def reservations(self) -> Reservations:
        return Reservations(self.session)

    @cached_property
    def encodings(self) -> Encodings:
        return Encodings(self.session)

    @cached_property
    def jobs(self) -> Jobs:
        return Jobs(self.session)

    @cached_property
    def adapters(self) -> Adapters:
        return Adapters(self.session)

    @cached_property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.session)

    @cached_property
    def evaluation_answers(self) -> EvaluationAnswers:
        return EvaluationAnswers(self.session)

    @cached_property
    def blob_references(self) -> BlobReferences:
        return BlobReferences(self.session)

    @cached_property
    def aliases(self) -> Aliases:
        return Aliases(self.session)

    @cached_property
    def predictions(self) -> Predictions:
        return Predictions(self.session)

    @cached_property
    def keys(self) -> IdempotencyKeys:
        return IdempotencyKeys(self.session)


class Database:
    """One engine. `read()` and `write()` give a unit of work. A write commits at the end of its block."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)

    @contextmanager
    def read(self) -> Iterator[Unit]:
        with self._session(write=False) as session:
            yield Unit(session)

    @contextmanager
    def write(self) -> Iterator[Unit]:
        with self._session(write=True) as session:
            yield Unit(session)
            session.commit()

    @contextmanager
    def _session(self, *, write: bool) -> Iterator[Session]:
        engine = self.engine.execution_options(**{WRITES: write})
        with Session(engine, expire_on_commit=False) as session:
            try:
                yield session
            except (OperationalError, InterfaceError, PoolTimeoutError) as error:
                if _is_full(error):
                    raise self._full() from error
                raise UnavailableError(
                    "the database does not answer; try again", code="database_away", retry_after=2
                ) from error
            except DataError as error:
                raise InvalidError(
                    "a text or a number in the request is one that the database cannot store", code="bad_value"
                ) from error

    def _full(self) -> StorageError:
        what = "the database cannot be written"
        if self.engine.url.get_backend_name() == "sqlite" and self.engine.url.database:
            return disk_error(what, Path(self.engine.url.database).parent, "its disk is full", errno.ENOSPC)
        return StorageError(f"{what}: its server's disk is full; free some space there", code="disk")

    def close(self) -> None:
        self.engine.dispose()


def _is_full(error: Exception) -> bool:
    """SQLite reports it in the message, Postgres by SQLSTATE 53100."""
    cause = getattr(error, "orig", None)
    return "disk is full" in str(cause) or getattr(cause, "sqlstate", None) == "53100"


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database and parsed.database != ":memory:":
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, pool_size=POOL_SIZE, max_overflow=0, connect_args={"timeout": 15})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    if parsed.get_backend_name() == "postgresql" and parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return create_engine(parsed, pool_size=POOL_SIZE, max_overflow=0, pool_pre_ping=True)


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN is deferred
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=15000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get(WRITES, True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
