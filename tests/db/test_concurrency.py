"""Many threads at once, on both databases: what one transaction sees, waits for, and leaves."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event

from app.db import Database, Unit
from app.db.tables import EncodingRow
from app.domain.jobs import JobStatus, Lease
from tests.db.rows import adapter_row

THREADS = 8
LEASE_SECONDS = 30.0


def at_once(work: Callable[[int], object]) -> None:
    """Run `work(number)` in every thread from one moment on; what one raises is raised here."""
    start = threading.Barrier(THREADS)

    def run(number: int) -> None:
        start.wait(10)
        work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(run, number) for number in range(THREADS)]:
            done.result(60)


def leased(unit: Unit, owner: str) -> Lease:
    row = unit.jobs.lease(["train"], owner, LEASE_SECONDS)
    assert row is not None
    return Lease(job_id=row.id, epoch=row.epoch, owner=owner)


def test_fifty_jobs_are_leased_once_each_by_eight_workers(database: Database, add_job: Callable[[], str]) -> None:
    jobs = [add_job() for _ in range(50)]
    taken: list[str] = []

    def drain(number: int) -> None:
        while True:
            with database.write() as unit:
                row = unit.jobs.lease(["train"], f"worker-{number}", LEASE_SECONDS)
            if row is None:
                return
            taken.append(row.id)

    at_once(drain)

    assert Counter(taken) == Counter(jobs)
    with database.read() as unit:
        owners = {row.owner for row in map(unit.jobs.find, jobs) if row}
    assert len(owners) > 1


def test_an_expired_lease_goes_to_one_heir(database: Database, add_job: Callable[[], str]) -> None:
    job = add_job()
    with database.write() as unit:
        assert unit.jobs.lease(["train"], "gone", 0.0) is not None
    time.sleep(0.01)
    heirs: list[int] = []

    def inherit(number: int) -> None:
        with database.write() as unit:
            row = unit.jobs.lease(["train"], f"worker-{number}", LEASE_SECONDS)
            if row is not None:
                heirs.append(row.epoch)

    at_once(inherit)

    assert heirs == [2]
    with database.read() as unit:
        found = unit.jobs.find(job)
    assert found is not None
    assert found.epoch == 2


def test_events_of_eight_writers_have_no_gap_and_no_double(database: Database, add_job: Callable[[], str]) -> None:
    job = add_job()

    def write(number: int) -> None:
        for line in range(10):
            with database.write() as unit:
                unit.jobs.add_event(job, "log", f"{number}: {line}", "info", {})

    at_once(write)

    with database.read() as unit:
        assert [event.seq for event in unit.jobs.events(job, 0, 1_000)] == list(range(1, 81))


def test_rows_that_many_write_for_the_first_time_end_as_one(database: Database) -> None:
    def write(number: int) -> None:
        for turn in range(5):
            with database.write() as unit:
                unit.aliases.point("adapter", f"default-{turn}", f"adp_{number}")
            with database.write() as unit:
                unit.devices.put(f"host-{turn}", {"by": number})
            with database.write() as unit:
                unit.encodings.put(EncodingRow(key=str(turn), blob="0" * 64, summary={"by": number}))

    at_once(write)

    with database.read() as unit:
        assert sum(len(names) for names in unit.aliases.names_by_target("adapter").values()) == 5
        assert len(unit.devices.list_devices()) == 5
        assert unit.encodings.get("4") is not None


def test_a_later_write_of_the_same_row_replaces_it(database: Database) -> None:
    for target in ("adp_1", "adp_2"):
        with database.write() as unit:
            unit.aliases.point("adapter", "default", target)
            assert unit.aliases.find_target("adapter", "default") == target


def test_a_unit_that_raises_leaves_nothing(database: Database, add_job: Callable[[], str]) -> None:
    job = add_job()

    def fail_half_way() -> None:
        with database.write() as unit:
            leased(unit, "worker-1")
            unit.jobs.add_event(job, "log", "never", "info", {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    with database.read() as unit:
        found = unit.jobs.find(job)
        assert found is not None
        assert (found.status, found.epoch, found.event_seq) == ("queued", 0, 0)
        assert unit.jobs.events(job, 0, 10) == []


def test_a_reader_does_not_wait_for_a_writer(database: Database, add_job: Callable[[], str]) -> None:
    job = add_job()
    with database.write() as writer:
        writer.jobs.add_event(job, "log", "not yet", "info", {})
        began = time.monotonic()
        with database.read() as reader:
            assert reader.jobs.events(job, 0, 10) == []
        assert time.monotonic() - began < 1.0


def test_a_writer_waits_for_the_writer_before_it(database: Database, add_job: Callable[[], str]) -> None:
    job = add_job()
    inside = threading.Event()

    def slow() -> None:
        with database.write() as unit:
            unit.jobs.add_event(job, "log", "first", "info", {})
            inside.set()
            time.sleep(0.5)

    thread = threading.Thread(target=slow)
    thread.start()
    inside.wait(5)
    with database.write() as unit:
        unit.jobs.add_event(job, "log", "second", "info", {})
    thread.join()
    with database.read() as unit:
        assert [event.message for event in unit.jobs.events(job, 0, 10)] == ["first", "second"]


def test_a_cancel_cannot_slip_in_while_a_job_ends(database: Database, add_job: Callable[[], str]) -> None:
    """A publish asks whether the job is being cancelled and then ends it: both answers must be about one status."""
    job = add_job()
    with database.write() as unit:
        lease = leased(unit, "worker-1")

    def cancel() -> None:
        with database.write() as unit:
            unit.jobs.move(job, JobStatus.RUNNING, JobStatus.CANCELLING)

    cancelling = threading.Thread(target=cancel)

    def after_statement(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.startswith("UPDATE jobs") and cancelling.ident is None:
            cancelling.start()
            cancelling.join(0.5)

    event.listen(database.engine, "after_cursor_execute", after_statement)
    with database.write() as unit:
        cancelled = unit.jobs.end(lease, (JobStatus.CANCELLING,), JobStatus.CANCELLED)
        unit.adapters.add(adapter_row(job))
        published = unit.jobs.end(lease, (JobStatus.RUNNING,), JobStatus.SUCCEEDED)
    cancelling.join(20)

    assert (cancelled, published) == (False, True)
    with database.read() as unit:
        found = unit.jobs.find(job)
    assert found is not None
    assert found.status == "succeeded"
