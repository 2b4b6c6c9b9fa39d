"""Faults of store, disk and database inside an attempt: real children, a disk that is really full."""

import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.composition import Services, compose
from app.db.migrating import migrate
from app.domain.attempts import CheckpointWritten
from app.domain.base_models import BaseModelDescription
from app.domain.errors import StorageError, UnavailableError
from app.domain.jobs import Event, Job, JobStatus
from app.settings import Settings
from tests.conftest import dataset_jsonl
from tests.worker.test_supervisor import LONG, TRAINER, children, updates
from worker import attempt
from worker.supervisor import Supervisor
from worker.training_attempt import RESERVE_BYTES

MIB = 1 << 20


def submit(services: Services, directory: Path, **trainer: object) -> Job:
    path = directory / "rows.jsonl"
    path.write_bytes(dataset_jsonl(8))
    dataset = services.datasets.create(path, "rows.jsonl", None, None, {})[0]
    return services.jobs.submit({"dataset": dataset.id, "adapter": {"type": "lora", "r": 4}, "trainer": trainer})


def orphans(services: Services) -> set[str]:
    """Stored blobs to which no row refers."""
    stored = {path.name for path in Path(services.settings.storage.removeprefix("file://")).glob("sha256/*/*")}
    with services.database.read() as unit:
        return unit.blob_references.unreferenced(stored)


def last_event(services: Services, job: Job) -> Event:
    return services.jobs.events(job.id, 0, 1_000)[0][-1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 40 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture(params=["the whole home", "the blobs alone"])
def cramped(
    request: pytest.FixtureRequest, small_disk: Path, tmp_path: Path, settings: Settings, tiny_cache: Path
) -> Iterator[Services]:
    """A deployment on the small disk, or with its blobs there. Some hundred kilobytes are free."""
    whole = request.param == "the whole home"
    where = {"home": small_disk / "home"} if whole else {"storage_url": f"file://{small_disk / 'blobs'}"}
    changed = settings.model_copy(update=where)
    migrate(changed.database)
    composed = compose(changed)
    composed.base_models.register(BaseModelDescription.model_validate_json((tiny_cache / "tiny.json").read_text()))
    room = 700_000 + RESERVE_BYTES if whole else 250_000
    with (small_disk / "ballast").open("wb") as ballast:
        ballast.write(b"\0" * (shutil.disk_usage(small_disk).free - room))
    yield composed
    composed.close()


@pytest.mark.slow
def test_a_full_disk_fails_the_job_at_once_with_a_message_and_leaves_no_orphan(
    cramped: Services, tmp_path: Path
) -> None:
    job = submit(cramped, tmp_path, **(TRAINER | {"train_steps": 100}))
    assert Supervisor(cramped, "worker-1", ("gpu",)).work()
    failed = cramped.jobs.get(job.id)
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert failed.error.code == "disk"
    assert "MB of 41.9 MB are free" in failed.error.message
    assert last_event(cramped, job).message == failed.error.message
    assert orphans(cramped) == set()
    assert children() == []
    assert not list(cramped.settings.work_path.glob("job_*"))


@pytest.mark.slow
def test_a_store_that_refuses_writes_fails_the_job_at_once(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory is a file all of a sudden."""
    job = submit(services, tmp_path, **(LONG | {"train_steps": 100}))
    store = Path(services.settings.storage.removeprefix("file://")) / "sha256"
    record = services.attempts.record

    def break_store(*given: Any) -> None:
        record(*given)
        if store.is_dir():
            store.rename(store.with_name("away"))
            store.touch()

    monkeypatch.setattr(services.attempts, "record", break_store)
    assert Supervisor(services, "worker-1", ("gpu",)).work()
    failed = services.jobs.get(job.id)
    assert failed.error is not None
    assert (failed.status, failed.error.code) == (JobStatus.FAILED, "disk")
    assert "Not a directory" in failed.error.message
    assert updates(services, job) < 100


@pytest.mark.slow
def test_a_transient_fault_fails_no_attempt(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Database and store are unavailable in turns, twice at each call."""
    job = submit(services, tmp_path, **TRAINER)
    calls: Counter[str] = Counter()

    def fail_twice(name: str) -> None:
        working = getattr(services.attempts, name)

        def call(*given: Any, **named: Any) -> Any:
            calls[name] += 1
            if calls[name] == 1:
                raise UnavailableError("the database does not answer", code="database_away")
            if calls[name] == 2:
                raise StorageError("the store answers 'slow down'")
            return working(*given, **named)

        monkeypatch.setattr(services.attempts, name, call)

    names = ("prepare", "fetch", "restore", "record", "checkpoint", "add_event")
    for name in names:
        fail_twice(name)
    assert Supervisor(services, "worker-1", ("gpu",)).work()
    done = services.jobs.get(job.id)
    assert (done.status, done.attempts) == (JobStatus.SUCCEEDED, 1)
    assert all(calls[name] > 2 for name in names)


@pytest.mark.slow
def test_a_store_that_stays_unavailable_requeues_the_job_and_fails_it_in_the_end(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "RETRY_LIMIT", 0.0)
    job = submit(services, tmp_path, **TRAINER)

    def away(*_given: Any) -> None:
        raise StorageError("a blob cannot be stored: the store answers 'timeout'")

    monkeypatch.setattr(services.attempts, "checkpoint", away)
    supervisor = Supervisor(services, "worker-1", ("gpu",))
    assert supervisor.work()
    assert services.jobs.get(job.id).status is JobStatus.QUEUED
    assert "timeout" in last_event(services, job).message
    assert supervisor.work()
    assert supervisor.work()
    failed = services.jobs.get(job.id)
    assert failed.error is not None
    assert (failed.status, failed.error.code) == (JobStatus.FAILED, "storage_away")
    assert "timeout" in last_event(services, job).message


@pytest.mark.slow
def test_a_fault_of_the_worker_itself_is_an_event_of_the_job(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(services, tmp_path, **TRAINER)
    monkeypatch.setattr(services.attempts, "prepare", lambda *_: {"a": 1}["b"])
    assert Supervisor(services, "worker-1", ("gpu",)).work()
    assert services.jobs.get(job.id).status is JobStatus.QUEUED
    assert "KeyError" in last_event(services, job).message


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Let this process write no file larger than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_the_store_refuses_leaves_no_blob(
    services: Services, tmp_path: Path, file_limit: Callable[[int], None]
) -> None:
    submit(services, tmp_path, **TRAINER)
    leased = services.attempts.lease(("train",), "worker-1")
    assert leased is not None
    directory = tmp_path / "update-000001"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "weights.safetensors").write_bytes(b"\1" * (8 * MIB))
    written = CheckpointWritten(update=1, path=directory, digest="0" * 64)
    file_limit(4 * MIB)
    with pytest.raises(
        StorageError, match=r"a blob of 8\.4 MB cannot be stored: File too large.* are free at"
    ) as raised:
        services.attempts.checkpoint(leased.lease, written)
    assert raised.value.code == "disk"
    assert orphans(services) == set()
    assert services.jobs.checkpoints(leased.job_id) == []
    file_limit(resource.RLIM_INFINITY)
    services.attempts.checkpoint(leased.lease, written)
    assert [checkpoint.update for checkpoint in services.jobs.checkpoints(leased.job_id)] == [1]


def test_a_full_disk_does_not_pass_for_a_damaged_checkpoint(
    services: Services, tmp_path: Path, file_limit: Callable[[int], None]
) -> None:
    """The job would begin anew, and take as much room again."""
    submit(services, tmp_path, **TRAINER)
    leased = services.attempts.lease(("train",), "worker-1")
    assert leased is not None
    directory = tmp_path / "update-000001"
    directory.mkdir()
    (directory / "weights.safetensors").write_bytes(b"\1" * (8 * MIB))
    services.attempts.checkpoint(leased.lease, CheckpointWritten(update=1, path=directory, digest="0" * 64))
    file_limit(4 * MIB)
    with pytest.raises(StorageError, match="cannot be copied to this host: File too large"):
        services.attempts.restore(leased.lease, tmp_path / "restored")


def test_a_base_models_tokenizer_outlives_the_whole_model_that_shares_it(services: Services) -> None:
    """A published whole model has its base's tokenizer.json, byte for byte."""
    base = services.base_models.get(None)
    with services.database.read() as unit:
        assert unit.blob_references.unreferenced({base.tokenizer, base.config, "0" * 64}) == {"0" * 64}
