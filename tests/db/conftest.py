"""A migrated database of each kind, and rows to put into it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.db import Database
from app.db.migrating import migrate
from tests.db.rows import job_row


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'veritune.db'}"
    return str(request.getfixturevalue("empty_postgres_url"))


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    url = f"sqlite:///{tmp_path / 'veritune.db'}"
    migrate(url)
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def add_job(database: Database) -> Callable[[], str]:
    """Puts a job into the queue and tells its id."""

    def add() -> str:
        row = job_row()
        with database.write() as unit:
            unit.jobs.add(row)
        return row.id

    return add
