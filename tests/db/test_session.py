"""What both databases promise alike: one clock, plain errors, and values that come back as they went in."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import select, update

from app.db import Database
from app.db.base import clock
from app.db.tables import JobRow, PredictionRow
from app.domain.errors import InvalidError, UnavailableError
from app.domain.jobs import JobStatus


def test_the_databases_clock_is_the_worlds(database: Database) -> None:
    with database.read() as unit:
        told = unit.session.scalar(select(clock()))
    assert told == pytest.approx(time.time(), abs=2.0)


def test_the_clock_goes_on_within_a_transaction(database: Database) -> None:
    """Postgres' now() would stand still, and a lease taken late in a transaction would be short."""
    with database.write() as unit:
        first = unit.session.scalar(select(clock()))
        time.sleep(0.05)
        second = unit.session.scalar(select(clock()))
    assert first is not None
    assert second is not None
    assert second - first > 0.03


def test_a_time_comes_back_in_utc_to_the_microsecond(database: Database) -> None:
    with database.write() as unit:
        unit.devices.put("host", {})
        (device,) = unit.devices.list_devices()
        unit.session.expire_all()
        (read,) = unit.devices.list_devices()
    assert read.last_seen == device.last_seen
    assert read.last_seen.tzinfo is UTC
    assert abs((datetime.now(UTC) - read.last_seen).total_seconds()) < 5


def test_documents_come_back_as_they_were(database: Database) -> None:
    claim = "Zoë crossed the Łódź-Ærø line in 𝟚𝟘𝟚𝟞\u2028\x00"
    document = {"claim": claim, "share": 0.1, "none": None, "deep": [{"a": [1]}]}
    with database.write() as unit:
        unit.predictions.add(PredictionRow(id="pred_1", answer=document, created_at=datetime.now(UTC)))
    with database.read() as unit:
        found = unit.predictions.find("pred_1")
    assert found is not None
    assert found.answer == document


def test_a_text_that_postgres_cannot_hold_is_bad_input(postgres_url: str) -> None:
    database = Database(postgres_url)
    with pytest.raises(InvalidError, match="cannot store"), database.read() as unit:
        unit.jobs.find("job\x00")
    database.close()


def test_jobs_are_listed_newest_first(database: Database, add_job: Callable[[], str]) -> None:
    jobs = [add_job() for _ in range(5)]
    with database.read() as unit:
        first, more = unit.jobs.list_jobs(None, 3, None)
        rest, none = unit.jobs.list_jobs(first[-1].id, 3, None)
    assert [row.id for row in (*first, *rest)] == sorted(jobs, reverse=True)
    assert (more, none) == (True, False)


def test_jobs_are_shown_by_id_or_name_with_their_place_in_the_queue(
    database: Database, add_job: Callable[[], str]
) -> None:
    first, second, third, _ = (add_job() for _ in range(4))
    with database.write() as unit:
        unit.jobs.move(second, JobStatus.QUEUED, JobStatus.PAUSED)
        unit.session.execute(update(JobRow).where(JobRow.id == third).values(name="third"))
    with database.read() as unit:
        shown = {row.name: (row.id, row.queue_position) for row in unit.jobs.get_jobs([first, second, "third", "none"])}
    assert shown == {first: (first, 1), second: (second, None), "third": (third, 2)}


@pytest.mark.parametrize(
    "url", ["postgresql://nobody@127.0.0.1:1/none?connect_timeout=2", "sqlite:///{directory}/folder"]
)
def test_a_database_that_is_away_is_told_so(url: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    database = Database(url.format(directory=tmp_path))
    with pytest.raises(UnavailableError, match="try again"), database.read() as unit:
        unit.jobs.find("job_1")
    database.close()
