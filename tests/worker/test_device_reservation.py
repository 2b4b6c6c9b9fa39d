"""A job's device reservation: real children start once inference has released the device. Their end releases it."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from app.composition import Services, compose
from app.domain.attempts import UpdateMetrics
from app.domain.errors import UnavailableError
from app.domain.jobs import Event, Job, JobAction, JobStatus
from app.domain.ledger import Policy, Reservation, Tenant
from app.domain.plans import Plan
from tests.conftest import dataset_jsonl
from tests.waiting import until
from tests.worker.test_supervisor import LONG, TRAINER, _start_owner, children, updates
from worker import device_reservation
from worker.child import SPARE_BYTES
from worker.device import describe_device
from worker.device_reservation import TrainingReservation
from worker.supervisor import Supervisor
from worker.watch import ENDING, Watch

pytestmark = pytest.mark.slow


class Host:
    """A host: its deployment, its supervisors in threads, and its rows of the ledger."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.name = services.settings.host_name
        self.threads: list[tuple[Supervisor, threading.Thread]] = []

    def work(self, owner: str = "worker-1") -> threading.Thread:
        supervisor = Supervisor(self.services, owner, ("gpu",))
        thread = threading.Thread(target=supervisor.work)
        thread.start()
        self.threads.append((supervisor, thread))
        return thread

    def submit(self, trainer: Mapping[str, object], layers: str = "q_proj") -> Job:
        dataset = self.services.datasets.list_datasets(None, 1)[0][0]
        adapter = {"type": "lora", "r": 4, "target_modules": [layers]}
        return self.services.jobs.submit({"dataset": dataset.id, "adapter": adapter, "trainer": dict(trainer)})

    def reserve_inference(self) -> None:
        assert self.services.ledger.reserve_for_inference(self.name, "server", 1 << 30) is None

    def reserved(self) -> dict[Tenant, Reservation]:
        return {one.tenant: one for one in self.services.ledger.by_host().get(self.name, ())}

    def device_events(self, job: Job) -> list[Event]:
        return [event for event in self.services.jobs.events(job.id, 0, 1_000)[0] if event.kind == "device"]

    def status(self, job: Job) -> JobStatus:
        return self.services.jobs.get(job.id).status


@pytest.fixture
def host(request: pytest.FixtureRequest, services: Services, tmp_path: Path) -> Iterator[Host]:
    """A host with a dataset. The test's parameter is the device policy."""
    changed = services.settings.model_copy(update={"device_policy": getattr(request, "param", "auto")})
    composed = compose(changed, doorbell=services.doorbell)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(dataset_jsonl(8))
    composed.datasets.create(path, path.name, None, None, {})
    composed.devices.report(changed.worker_name, describe_device(("gpu",)))
    made = Host(composed)
    yield made
    for supervisor, thread in made.threads:
        supervisor.leave()
        thread.join(60)
        assert not thread.is_alive()
    composed.close()


def test_a_small_job_shares_the_device_and_does_not_wait(host: Host) -> None:
    host.reserve_inference()
    job = host.submit(LONG)
    assert isinstance(job.plan, Plan)
    assert job.plan.policy is Policy.SHARE
    thread = host.work()
    until(lambda: updates(host.services, job) > 0)
    assert job.plan.memory is not None
    mine = host.reserved()[Tenant.TRAINING]
    assert (mine.bytes, mine.policy, mine.job_id) == (job.plan.memory.total, Policy.SHARE, job.id)
    assert host.services.ledger.inference_unavailable(host.name) is None
    host.services.jobs.request_action(job.id, JobAction.CANCEL)
    thread.join(30)
    assert Tenant.TRAINING not in host.reserved()  # inference's is not renewed here and may have expired
    assert host.device_events(job) == []


@pytest.mark.parametrize("host", ["yield"], indirect=True)
def test_a_job_begins_when_inference_has_released_the_device(host: Host) -> None:
    host.reserve_inference()
    job = host.submit(TRAINER | {"train_steps": 60})
    thread = host.work()
    until(lambda: len(host.device_events(job)) > 0)
    assert "waiting for inference" in host.device_events(job)[0].message
    assert host.services.ledger.inference_is_suspended()
    time.sleep(1)
    assert children() == []
    host.services.ledger.release(host.name, "server")
    until(lambda: updates(host.services, job) > 0)
    until(lambda: (host.reserved()[Tenant.TRAINING].ends_in or 0) > 0)
    assert host.services.ledger.reserve_for_inference(host.name, "server", 1) is not None
    thread.join(60)
    assert host.status(job) is JobStatus.SUCCEEDED
    assert host.reserved() == {}
    assert host.device_events(job)[-1].data["seconds"] >= 1


@pytest.mark.parametrize("host", ["yield"], indirect=True)
@pytest.mark.parametrize(
    ("wish", "end"), [(JobAction.CANCEL, JobStatus.CANCELLED), (JobAction.PAUSE, JobStatus.PAUSED)]
)
def test_a_job_that_waits_for_the_device_can_be_stopped(host: Host, wish: JobAction, end: JobStatus) -> None:
    host.reserve_inference()
    job = host.submit(TRAINER)
    thread = host.work()
    until(lambda: len(host.device_events(job)) > 0)
    host.services.jobs.request_action(job.id, wish)
    thread.join(20)
    assert host.status(job) is end
    assert set(host.reserved()) == {Tenant.INFERENCE}
    assert children() == []


@pytest.mark.parametrize("host", ["yield"], indirect=True)
def test_a_job_is_requeued_if_inference_does_not_release_the_device(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_reservation, "PATIENCE", -host.services.ledger.inference_lease)
    host.reserve_inference()
    job = host.submit(TRAINER)
    host.work().join(20)
    assert host.status(job) is JobStatus.QUEUED
    requeued = host.services.jobs.events(job.id, 0, 100)[0][-1]
    assert (requeued.data["reason"], requeued.data["strikes"]) == ("inference did not release the device", 0)
    assert set(host.reserved()) == {Tenant.INFERENCE}


@pytest.mark.parametrize("host", ["exclusive"], indirect=True)
def test_a_second_job_waits_for_the_first_as_long_as_it_takes(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_reservation, "PATIENCE", -1_000.0)
    first, second = host.submit(TRAINER | {"train_steps": 60}), host.submit(TRAINER)
    threads = [host.work("worker-1"), host.work("worker-2")]
    until(lambda: len(host.device_events(first)) + len(host.device_events(second)) > 0)
    assert len(children()) <= 1
    for thread in threads:
        thread.join(60)
    assert [host.status(job) for job in (first, second)] == [JobStatus.SUCCEEDED] * 2
    events = host.device_events(first) or host.device_events(second)
    assert "waiting for another job" in events[0].message
    assert host.reserved() == {}


@pytest.mark.parametrize("host", ["exclusive"], indirect=True)
def test_waiting_for_another_job_does_not_count_as_waiting_for_inference(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inference resumes between two jobs, and is suspended as soon as the second one reserves."""
    monkeypatch.setattr(device_reservation, "PATIENCE", 1.5 - host.services.ledger.inference_lease)
    over = threading.Event()

    def infer() -> None:
        while not over.wait(0.02):
            if host.services.ledger.reserve_for_inference(host.name, "server", 1 << 30) is not None:
                host.services.ledger.release(host.name, "server")

    inference = threading.Thread(target=infer)
    inference.start()
    jobs = [host.submit(TRAINER | {"train_steps": 60}), host.submit(TRAINER | {"train_steps": 60})]
    try:
        for thread in [host.work("worker-1"), host.work("worker-2")]:
            thread.join(60)
    finally:
        over.set()
        inference.join()
    assert [host.status(job) for job in jobs] == [JobStatus.SUCCEEDED] * 2
    assert [host.services.jobs.get(job.id).attempts for job in jobs] == [1, 1]


def test_a_ledger_unavailable_for_a_moment_fails_no_attempt(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, train = [], host.services.ledger.reserve_for_training

    def sometimes(*given: Any) -> Any:
        asked.append(given)
        if len(asked) < 3:
            raise UnavailableError("the database does not answer")
        return train(*given)

    monkeypatch.setattr(host.services.ledger, "reserve_for_training", sometimes)
    job = host.submit(TRAINER)
    host.work().join(60)
    assert (host.status(job), host.services.jobs.get(job.id).attempts) == (JobStatus.SUCCEEDED, 1)


@pytest.mark.parametrize("ending", ["paused", "lost child", "failed"])
def test_every_ending_releases_the_device(host: Host, ending: str) -> None:
    job = host.submit(LONG, "layers.99.self_attn.q_proj" if ending == "failed" else "q_proj")
    thread = host.work()
    if ending != "failed":
        until(lambda: updates(host.services, job) > 0)
        assert set(host.reserved()) == {Tenant.TRAINING}
    if ending == "paused":
        host.services.jobs.request_action(job.id, JobAction.PAUSE)
    if ending == "lost child":
        os.kill(children()[0].pid, signal.SIGKILL)
    thread.join(60)
    assert host.status(job) is {"paused": JobStatus.PAUSED, "failed": JobStatus.FAILED}.get(ending, JobStatus.QUEUED)
    assert host.reserved() == {}


def test_a_killed_owners_reservation_expires_within_its_lease(host: Host, tmp_path: Path) -> None:
    hasty = host.services.settings.model_copy(update={"lease_seconds": 2.0})
    job = host.submit(LONG)
    owner = _start_owner(hasty.model_dump(mode="json", exclude_none=True), tmp_path)
    until(lambda: updates(host.services, job) > 0)
    assert set(host.reserved()) == {Tenant.TRAINING}
    os.kill(owner, signal.SIGKILL)
    began = time.monotonic()
    os.waitpid(owner, 0)
    until(lambda: host.reserved() == {})
    assert time.monotonic() - began < 2.5


def test_no_process_waits_for_a_job_where_others_have_the_memory(host: Host) -> None:
    supervisor = Supervisor(host.services, "worker-1", ("gpu",))
    supervisor.warm_up()
    assert len(children()) == 1
    size = describe_device(("gpu",)).bytes
    assert host.services.ledger.reserve_for_inference(host.name, "server", size - SPARE_BYTES + 1) is None
    supervisor.warm_up()
    assert children() == []
    assert host.services.ledger.reserve_for_inference(host.name, "server", size - SPARE_BYTES) is None
    supervisor.warm_up()
    assert len(children()) == 1
    supervisor.dismiss()


def metrics(update: int, seconds: float) -> UpdateMetrics:
    return UpdateMetrics.model_validate(
        {
            "update": update,
            "total_updates": 100,
            "epoch": 1.0,
            "loss": 1.0,
            "learning_rate": 1.0,
            "grad_norm": 1.0,
            "tokens": 1,
            "labelled_tokens": 1,
            "tokens_per_second": 1.0,
            "seconds": seconds,
        }
    )


@pytest.mark.parametrize("planned", [None, 2.0])
def test_the_estimated_end_follows_wall_clock_time(monkeypatch: pytest.MonkeyPatch, planned: float | None) -> None:
    """An update measures one second; with the work between updates it is two."""
    clock = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watch = Watch(TrainingReservation.__new__(TrainingReservation), planned)
    watch.add(metrics(1, 1.0))
    first = 1.0 if planned is None else planned
    assert watch.ends_in(metrics(1, 1.0)) == pytest.approx(99 * first + ENDING)
    for update in range(2, 11):
        clock[0] += 2.0
        watch.add(metrics(update, 1.0))
    assert watch.eta(metrics(10, 1.0)) == 90.0
    assert watch.ends_in(metrics(10, 1.0)) == pytest.approx(90 * 2.0 + ENDING)
