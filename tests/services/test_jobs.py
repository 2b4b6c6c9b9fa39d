"""Jobs as users and workers see them: the state machine, the lease and the fence, over a real database."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.composition import Services
from app.domain.attempts import CheckpointWritten, EvaluationFinished, UpdateMetrics
from app.domain.errors import ConflictError, InvalidError, LeaseLostError, NotFoundError, NotYetSupportedError
from app.domain.jobs import (
    ACTION_TRANSITIONS,
    MAX_ATTEMPTS,
    TRANSITIONS,
    Job,
    JobAction,
    JobError,
    JobProgress,
    JobStatus,
)
from app.domain.plans import Plan
from app.domain.specs import JobKind
from app.domain.splits import SplitName
from app.queue import MemoryDoorbell
from app.services.attempts import Attempts, Leased
from app.services.plans import Prepared

KINDS = ("train",)


@pytest.fixture
def dataset(services: Services, upload: Path) -> str:
    return services.datasets.create(upload, "rows.jsonl", None, "rows", {})[0].id


@pytest.fixture
def job(services: Services, dataset: str) -> Job:
    return services.jobs.submit({"dataset": dataset})


@pytest.fixture
def hasty(services: Services) -> Attempts:
    """Attempts whose leases expire at once, as if their worker had been lost for long."""
    return Attempts(services.database, services.blobs, services.plans, lease_seconds=0.0)


def leased(attempts: Attempts, owner: str = "worker-1") -> Leased:
    found = attempts.lease(KINDS, owner)
    assert found is not None
    return found


def metrics(update: int) -> UpdateMetrics:
    return UpdateMetrics(
        update=update,
        total_updates=3,
        epoch=float(update),
        loss=1.5,
        learning_rate=1e-4,
        grad_norm=0.5,
        tokens=10,
        labelled_tokens=4,
        tokens_per_second=100.0,
        seconds=0.1,
    )


def validation(update: int) -> EvaluationFinished:
    return EvaluationFinished(part=SplitName.VALIDATION, update=update, rows=4, loss=0.5, accuracy=0.75, seconds=0.1)


def test_an_evaluation_is_an_event_and_part_of_its_updates_metrics(services: Services, job: Job) -> None:
    """If a command interrupted it, it follows the metrics; otherwise the metrics include it."""
    lease = leased(services.attempts).lease
    services.attempts.record(lease, [metrics(1)], 1.0)
    for update in (1, 2):
        services.attempts.evaluated(lease, validation(update))
    services.attempts.evaluated(lease, validation(1).model_copy(update={"part": SplitName.TEST, "loss": None}))
    (row,) = services.jobs.metrics(job.id, 0, 10)[0]
    assert (row.loss, row.validation_loss, row.validation_accuracy) == (1.5, 0.5, 0.75)
    messages = [event.message for event in services.jobs.events(job.id, 0, 100)[0] if event.kind == "evaluated"]
    assert messages == [
        "validation loss 0.5000, token accuracy 75.0% at update 1",
        "validation loss 0.5000, token accuracy 75.0% at update 2",
        "test loss not finite, token accuracy 75.0% at update 1",
    ]


def test_every_action_is_a_path_of_the_state_machine() -> None:
    for made_in in ACTION_TRANSITIONS.values():
        for before, after in made_in.items():
            assert before is after or after in TRANSITIONS[before]


def test_a_submitted_job_waits_with_a_plan_and_rings_the_bell(
    services: Services, dataset: str, doorbell: MemoryDoorbell
) -> None:
    rung: list[tuple[str, JobKind]] = []
    doorbell.listen(lambda job_id, kind: rung.append((job_id, kind)))

    job = services.jobs.submit({"dataset": "rows", "trainer": {"epochs": 2, "effective_batch_size": 2}})

    assert job.status is JobStatus.QUEUED
    assert job.queue_position == 1
    assert isinstance(job.plan, Plan)
    assert (job.plan.rows_trained, job.plan.total_updates, job.plan.rows_per_update) == (4, 4, 2)
    assert job.spec.dataset == dataset
    assert rung == [(job.id, JobKind.TRAIN)]


def test_the_bell_rings_only_for_a_committed_row(services: Services, dataset: str, doorbell: MemoryDoorbell) -> None:
    seen: list[JobStatus] = []
    doorbell.listen(lambda job_id, kind: seen.append(services.jobs.get(job_id).status))
    services.jobs.submit({"dataset": dataset})
    assert seen == [JobStatus.QUEUED]


def test_a_job_can_be_found_by_its_name_which_is_its_own(services: Services, dataset: str) -> None:
    job = services.jobs.submit({"dataset": dataset, "name": "first"})
    assert services.jobs.get("first").id == job.id
    with pytest.raises(ConflictError, match="named 'first'"):
        services.jobs.submit({"dataset": dataset, "name": "first"})


def test_a_dataset_deleted_while_a_job_is_submitted_is_named(
    services: Services, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = services.plans.prepare

    def prepare_and_delete(data: object) -> Prepared:
        prepared = prepare(data)
        services.datasets.delete(dataset)
        return prepared

    monkeypatch.setattr(services.plans, "prepare", prepare_and_delete)
    with pytest.raises(NotFoundError, match="dataset was deleted"):
        services.jobs.submit({"dataset": dataset})


def test_unsupported_options_are_refused_by_name(services: Services, dataset: str) -> None:
    with pytest.raises(NotYetSupportedError) as caught:
        services.jobs.submit({"dataset": dataset, "backend": {"processes": 2}})
    assert caught.value.problems[0].loc == ("backend", "processes")
    assert services.jobs.list_jobs(None, 10, None) == ([], False)


def test_an_unknown_dataset_and_base_model_are_named(services: Services, dataset: str) -> None:
    with pytest.raises(NotFoundError, match="ds_nowhere"):
        services.jobs.submit({"dataset": "ds_nowhere"})
    with pytest.raises(InvalidError, match="this deployment lists: tiny"):
        services.jobs.submit({"dataset": dataset, "base_model": "llama"})


def test_a_warning_about_a_result_is_on_the_job_and_in_an_event(services: Services, job: Job) -> None:
    lease = leased(services.attempts).lease
    services.attempts.record(lease, [metrics(1)], None)
    services.attempts.warn(lease, ("the loss rose: 2.79 over the first updates, 46.80 over the last ones",))
    progress = services.jobs.get(job.id).progress
    assert isinstance(progress, JobProgress)
    assert progress.update == 1
    assert progress.warnings == ("the loss rose: 2.79 over the first updates, 46.80 over the last ones",)
    event = services.jobs.events(job.id, 0, 100)[0][-1]
    assert (event.level, event.kind, event.message) == ("warning", "warning", progress.warnings[0])


def test_two_workers_ask_and_one_gets_the_job(services: Services, job: Job) -> None:
    first = services.attempts.lease(KINDS, "worker-1")
    second = services.attempts.lease(KINDS, "worker-2")
    assert first is not None
    assert second is None
    assert services.jobs.get(job.id).status is JobStatus.RUNNING


def test_the_oldest_job_runs_first(services: Services, dataset: str) -> None:
    jobs = [services.jobs.submit({"dataset": dataset}) for _ in range(3)]
    assert [services.jobs.get(job.id).queue_position for job in jobs] == [1, 2, 3]
    assert [leased(services.attempts).job_id for _ in jobs] == [job.id for job in jobs]


def test_a_worker_takes_only_kinds_it_runs(services: Services, job: Job) -> None:
    assert services.attempts.lease(("evaluate",), "runner") is None


def test_a_zombie_changes_no_row(services: Services, hasty: Attempts, job: Job, tmp_path: Path) -> None:
    zombie = leased(hasty, "worker-1").lease
    time.sleep(0.01)
    heir = leased(services.attempts, "worker-2").lease
    assert heir.epoch == zombie.epoch + 1
    before = services.jobs.get(job.id), services.jobs.events(job.id, 0, 100)
    directory = tmp_path / "update-000001"
    directory.mkdir()
    (directory / "manifest.json").write_text("{}")

    writes: list[Callable[[], object]] = [
        lambda: hasty.renew(zombie),
        lambda: hasty.add_event(zombie, "log", "still here"),
        lambda: hasty.record(zombie, [metrics(1)], 1.0),
        lambda: hasty.evaluated(zombie, validation(1)),
        lambda: hasty.checkpoint(zombie, CheckpointWritten(update=1, path=directory, digest="0" * 64)),
        lambda: services.artifacts.put(zombie, directory / "manifest.json"),
        lambda: hasty.fail(zombie, JobError(code="x", message="x")),
        lambda: hasty.release(zombie, "done", strike=False),
    ]
    for write in writes:
        with pytest.raises(LeaseLostError):
            write()

    assert (services.jobs.get(job.id), services.jobs.events(job.id, 0, 100)) == before
    assert services.jobs.metrics(job.id, 0, 10) == ([], False)
    assert services.jobs.checkpoints(job.id) == []
    assert services.artifacts.list_artifacts(job.id) == []


def test_too_many_lost_workers_fail_the_job_with_a_hint(services: Services, hasty: Attempts, job: Job) -> None:
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert leased(hasty, f"worker-{attempt}").attempt == attempt
        time.sleep(0.005)
    assert hasty.lease(KINDS, "worker-9") is None
    ended = services.jobs.get(job.id)
    assert ended.status is JobStatus.FAILED
    assert ended.error is not None
    assert ended.error.code == "worker_lost"
    assert ended.error.hint
    assert ended.finished_at is not None


def test_a_new_checkpoint_forgives_lost_workers(services: Services, hasty: Attempts, job: Job, tmp_path: Path) -> None:
    directory = tmp_path / "update-000001"
    directory.mkdir()
    (directory / "manifest.json").write_text("{}")
    for attempt in range(2 * MAX_ATTEMPTS):
        lease = leased(hasty).lease
        written = CheckpointWritten(update=attempt, path=directory, digest="0" * 64)
        services.attempts.checkpoint(lease, written)
        time.sleep(0.005)
    assert services.jobs.get(job.id).status is JobStatus.RUNNING


def test_only_the_last_two_checkpoints_are_kept_and_the_newest_is_restored(
    services: Services, job: Job, tmp_path: Path
) -> None:
    lease = leased(services.attempts).lease
    for update in (1, 2, 3):
        directory = tmp_path / f"update-{update}"
        directory.mkdir()
        (directory / "state.json").write_text(str(update))
        services.attempts.checkpoint(lease, CheckpointWritten(update=update, path=directory, digest="0" * 64))
    assert [checkpoint.update for checkpoint in services.jobs.checkpoints(job.id)] == [3, 2]
    restored = services.attempts.restore(lease, tmp_path / "restored")
    assert restored is not None
    assert (restored / "state.json").read_text() == "3"


def test_a_deleted_checkpoint_leaves_the_blobs_that_another_job_shares(
    services: Services, dataset: str, tmp_path: Path
) -> None:
    leases = []
    for _ in range(2):
        services.jobs.submit({"dataset": dataset})
        leases.append(leased(services.attempts).lease)
    for update in (1, 2, 3):
        directory = tmp_path / f"update-{update}"
        directory.mkdir()
        (directory / "state.json").write_text(str(update))
        services.attempts.checkpoint(leases[0], CheckpointWritten(update=update, path=directory, digest="0" * 64))
        if update == 1:
            services.attempts.checkpoint(leases[1], CheckpointWritten(update=update, path=directory, digest="0" * 64))
    restored = services.attempts.restore(leases[1], tmp_path / "restored")
    assert restored is not None
    assert (restored / "state.json").read_text() == "1"


def test_a_lost_blob_of_a_checkpoint_falls_back_to_the_one_before(services: Services, job: Job, tmp_path: Path) -> None:
    lease = leased(services.attempts).lease
    for update in (1, 2):
        directory = tmp_path / f"update-{update}"
        directory.mkdir()
        (directory / "state.json").write_text(str(update))
        services.attempts.checkpoint(lease, CheckpointWritten(update=update, path=directory, digest="0" * 64))
    services.blobs.delete(services.blobs.put_bytes(b"2").digest)

    restored = services.attempts.restore(lease, tmp_path / "restored")

    assert restored is not None
    assert (restored / "state.json").read_text() == "1"
    assert "checkpoint_damaged" in [event.kind for event in services.jobs.events(job.id, 0, 100)[0]]


@pytest.mark.parametrize(
    ("wish", "seen", "end"),
    [
        (JobAction.CANCEL, JobStatus.CANCELLING, JobStatus.CANCELLED),
        (JobAction.PAUSE, JobStatus.PAUSING, JobStatus.PAUSED),
    ],
)
def test_a_running_job_gets_an_action_through_its_heartbeat(
    services: Services, job: Job, wish: JobAction, seen: JobStatus, end: JobStatus
) -> None:
    lease = leased(services.attempts).lease
    services.jobs.request_action(job.id, wish)
    assert services.attempts.renew(lease) is seen
    services.attempts.release(lease, "stopped", strike=False)
    assert services.jobs.get(job.id).status is end


def test_an_action_whose_worker_is_lost_is_settled_by_the_lease_query(
    services: Services, hasty: Attempts, job: Job
) -> None:
    leased(hasty)
    services.jobs.request_action(job.id, JobAction.CANCEL)
    time.sleep(0.005)
    assert services.attempts.lease(KINDS, "worker-2") is None
    assert services.jobs.get(job.id).status is JobStatus.CANCELLED
    assert services.jobs.get(job.id).finished_at is not None


def test_a_waiting_job_is_paused_resumed_and_cancelled_at_once(services: Services, job: Job) -> None:
    assert services.jobs.request_action(job.id, JobAction.PAUSE).status is JobStatus.PAUSED
    assert services.attempts.lease(KINDS, "worker-1") is None
    assert services.jobs.request_action(job.id, JobAction.RESUME).status is JobStatus.QUEUED
    assert services.jobs.request_action(job.id, JobAction.CANCEL).status is JobStatus.CANCELLED
    assert services.jobs.request_action(job.id, JobAction.CANCEL).status is JobStatus.CANCELLED
    with pytest.raises(ConflictError, match="is cancelled"):
        services.jobs.request_action(job.id, JobAction.RESUME)


def test_a_failure_after_cancel_ends_as_cancelled(services: Services, job: Job) -> None:
    lease = leased(services.attempts).lease
    services.jobs.request_action(job.id, JobAction.CANCEL)
    services.attempts.fail(lease, JobError(code="x", message="x"))
    ended = services.jobs.get(job.id)
    assert (ended.status, ended.error) == (JobStatus.CANCELLED, None)


def test_events_have_no_gaps_and_page_forward(services: Services, job: Job) -> None:
    lease = leased(services.attempts).lease
    for number in range(20):
        services.attempts.add_event(lease, "log", f"line {number}")
    events, more = services.jobs.events(job.id, 0, 10)
    assert more
    others, more = services.jobs.events(job.id, events[-1].seq, 100)
    assert not more
    assert [event.seq for event in (*events, *others)] == list(range(1, 23))


def test_a_repeated_update_replaces_its_metrics(services: Services, job: Job) -> None:
    lease = leased(services.attempts).lease
    services.attempts.record(lease, [metrics(1), metrics(2)], 3.0)
    services.attempts.record(lease, [metrics(2).model_copy(update={"loss": 0.5, "skipped": True})], 2.0)
    rows, _ = services.jobs.metrics(job.id, 0, 10)
    assert [(row.update, row.loss) for row in rows] == [(1, 1.5), (2, 0.5)]
    progress = services.jobs.get(job.id).progress
    assert isinstance(progress, JobProgress)
    assert (progress.update, progress.eta_seconds) == (2, 2.0)
    assert "update_skipped" in [event.kind for event in services.jobs.events(job.id, 0, 100)[0]]


def test_a_dataset_in_use_is_not_deleted(services: Services, dataset: str, job: Job) -> None:
    with pytest.raises(ConflictError, match=job.id):
        services.datasets.delete(dataset)
    services.jobs.request_action(job.id, JobAction.CANCEL)
    services.datasets.delete(dataset)
    assert services.jobs.get(job.id).spec.dataset == dataset
    with pytest.raises(NotFoundError):
        services.datasets.get(dataset)
