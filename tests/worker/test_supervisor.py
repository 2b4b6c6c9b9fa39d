"""The supervisor with real training children on the tiny model, over a real database."""

import json
import os
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.composition import Services, compose
from app.domain.adapters import adapter_digest
from app.domain.attempts import TrainOrder
from app.domain.errors import InvalidError
from app.domain.jobs import Job, JobAction, JobProgress, JobStatus
from app.domain.plans import Plan
from app.domain.specs import TrainSpec
from tests.conftest import dataset_jsonl
from tests.waiting import until
from worker.child import Child
from worker.device import describe_device
from worker.supervisor import Supervisor

pytestmark = pytest.mark.slow
TRAINER = {"train_steps": 6, "effective_batch_size": 2, "learning_rate": 1e-2, "steps_per_checkpoint": 2}
LONG = TRAINER | {"train_steps": 2_000, "steps_per_checkpoint": 10}


@pytest.fixture
def submit(services: Services, tmp_path: Path) -> Callable[..., Job]:
    def one(**trainer: object) -> Job:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(dataset_jsonl(8))
        dataset = services.datasets.create(path, "rows.jsonl", None, None, {})[0]
        return services.jobs.submit({"dataset": dataset.id, "adapter": {"type": "lora", "r": 4}, "trainer": trainer})

    return one


@pytest.fixture
def supervisor(services: Services) -> Supervisor:
    return Supervisor(services, "worker-1", ("gpu",))


@pytest.fixture
def background() -> Iterator[Callable[[Supervisor], threading.Thread]]:
    """Run a supervisor's `work` in a thread, which is over when the test is."""
    threads: list[tuple[Supervisor, threading.Thread]] = []

    def start(chosen: Supervisor) -> threading.Thread:
        thread = threading.Thread(target=chosen.work)
        thread.start()
        threads.append((chosen, thread))
        return thread

    yield start
    for chosen, thread in threads:
        chosen.leave()
        thread.join(60)
        assert not thread.is_alive()


def updates(services: Services, job: Job) -> int:
    progress = services.jobs.get(job.id).progress
    return progress.update if isinstance(progress, JobProgress) else 0


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "worker.training" in p.cmdline()]


def kinds(services: Services, job: Job) -> list[str]:
    return [event.kind for event in services.jobs.events(job.id, 0, 1_000)[0]]


def test_a_job_runs_to_a_published_adapter(
    services: Services, supervisor: Supervisor, submit: Callable[..., Job], tmp_path: Path
) -> None:
    job = submit(**TRAINER)

    assert supervisor.work()

    done = services.jobs.get(job.id)
    assert done.status is JobStatus.SUCCEEDED, done.error
    rows, _ = services.jobs.metrics(job.id, 0, 100)
    assert [row.update for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1].loss is not None
    assert rows[0].loss is not None
    assert rows[-1].loss < rows[0].loss
    assert [event.seq for event in services.jobs.events(job.id, 0, 100)[0]] == list(
        range(1, len(kinds(services, job)) + 1)
    )
    assert {"queued", "started", "training", "checkpoint", "succeeded"} <= set(kinds(services, job))

    adapter = services.adapters.get(str(done.adapter_id))
    assert adapter.aliases == ("default",)
    assert adapter.manifest.dataset_rows == 8
    assert adapter.manifest.base.name == "tiny"
    assert adapter.manifest.environment is not None
    assert adapter.manifest.environment.device == "cpu"
    assert adapter.manifest.environment.precision in ("fp32", "bf16")
    assert 1 <= adapter.manifest.environment.threads <= len(os.sched_getaffinity(0))
    _name, stream = services.adapters.archive(adapter.id)
    with zipfile.ZipFile(BytesIO(b"".join(stream))) as archive:
        assert sorted(archive.namelist()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "manifest.json",
        ]
        assert json.loads(archive.read("manifest.json"))["job_id"] == job.id
        weights = tmp_path / "adapter_model.safetensors"
        weights.write_bytes(archive.read("adapter_model.safetensors"))
        config = archive.read("adapter_config.json")
    with safe_open(weights, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118  not a dict
            assert tensors.get_tensor(key).abs().max() > 0, key
    assert adapter.digest == adapter_digest(services.blobs.put_file(weights).digest, config)
    assert not list(services.settings.work_path.glob("job_*"))


def test_the_child_is_told_how_much_memory_the_plan_leaves_it(
    services: Services, supervisor: Supervisor, submit: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    services.devices.report(services.settings.worker_name, describe_device(("gpu",)))
    orders: list[TrainOrder] = []
    begin = Child.begin

    def listen(child: Child, order: TrainOrder) -> None:
        orders.append(order)
        begin(child, order)

    monkeypatch.setattr(Child, "begin", listen)
    job = submit(**TRAINER)
    assert isinstance(job.plan, Plan)

    assert supervisor.work()

    assert services.jobs.get(job.id).status is JobStatus.SUCCEEDED
    assert job.plan.memory is not None
    assert [order.resident_limit for order in orders] == [job.plan.memory.between_micro_batches]


def test_a_run_whose_loss_rises_is_warned_about_on_the_job_and_on_its_adapter(
    services: Services, supervisor: Supervisor, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(dataset_jsonl(8))
    dataset = services.datasets.create(path, "rows.jsonl", None, None, {})[0]
    trainer = TRAINER | {"learning_rate": 1.0, "learning_rate_scheduler": {"decay": "constant"}}
    job = services.jobs.submit({"dataset": dataset.id, "adapter": None, "quantization": None, "trainer": trainer})

    assert supervisor.work()

    done = services.jobs.get(job.id)
    losses = [metric.loss for metric in services.jobs.metrics(job.id, 0, 100)[0]]
    assert isinstance(done.progress, JobProgress)
    assert len(done.progress.warnings) == 1, losses
    (warning,) = done.progress.warnings
    assert warning.startswith("the loss rose")
    assert [e.message for e in services.jobs.events(job.id, 0, 100)[0] if e.kind == "warning"] == [warning]
    assert services.adapters.get(str(done.adapter_id)).manifest.warnings == (warning,)


def test_evaluations_are_events_and_choose_the_published_update(
    services: Services, supervisor: Supervisor, tmp_path: Path
) -> None:
    path = tmp_path / "parted.jsonl"
    rows = [json.loads(line) for line in dataset_jsonl(12).splitlines()]
    path.write_text("\n".join(json.dumps(row | {"split": number % 3}) for number, row in enumerate(rows)))
    dataset = services.datasets.create(path, path.name, None, None, {})[0]
    spec = {"dataset": dataset.id, "adapter": {"type": "lora", "r": 4}, "preprocessing": {"split": {"type": "fixed"}}}
    job = services.jobs.submit(spec | {"trainer": TRAINER})
    assert supervisor.work()
    done = services.jobs.get(job.id)
    assert done.status is JobStatus.SUCCEEDED, done.error
    evaluations = [e.data for e in services.jobs.events(job.id, 0, 100)[0] if e.kind == "evaluated"]
    assert [(data["part"], data["update"]) for data in evaluations[:-1]] == [("validation", n) for n in (2, 4, 6)]
    found = services.jobs.metrics(job.id, 0, 100)[0]
    by_update = {data["update"]: (data["loss"], data["accuracy"]) for data in evaluations[:-1]}
    assert {m.update: (m.validation_loss, m.validation_accuracy) for m in found} == by_update | dict.fromkeys(
        (1, 3, 5), (None, None)
    )
    manifest = services.adapters.get(str(done.adapter_id)).manifest
    assert manifest.metrics["validation_loss"] == min(loss for loss, _ in by_update.values())
    assert manifest.metrics["test_loss"] == evaluations[-1]["loss"]
    assert manifest.dataset_rows == 4

    losses = [json.loads(line) for line in b"".join(services.artifacts.stream(job.id, "rows.jsonl")).splitlines()]
    assert [row["part"] for row in losses] == ["train", "validation", "test"] * 4
    assert all(row["loss"] for row in losses)
    event_file = tmp_path / "events.out.tfevents"
    event_file.write_bytes(b"".join(services.artifacts.stream(job.id, event_file.name)))
    scalars = EventAccumulator(str(event_file)).Reload().Scalars("train/loss")
    assert {e.step: e.value for e in scalars} == pytest.approx({m.update: m.loss for m in found}, rel=1e-6)

    best = next(checkpoint for checkpoint in services.jobs.checkpoints(job.id) if checkpoint.best)
    again = services.checkpoints.publish(job.id, best.update, "best")
    assert again.digest == services.adapters.get(str(done.adapter_id)).digest
    assert again.manifest.metrics["updates"] == best.update == manifest.metrics["best_update"]
    assert again.manifest.environment == manifest.environment


def test_the_pace_of_a_job_predicts_the_time_of_the_next(
    services: Services, supervisor: Supervisor, submit: Callable[..., Job]
) -> None:
    services.devices.report(services.settings.worker_name, describe_device(("gpu",)))
    job = submit(**TRAINER)
    assert isinstance(job.plan, Plan)
    assert isinstance(job.spec, TrainSpec)
    assert (job.plan.fits, job.plan.seconds) == (True, None)
    supervisor.work()
    (device,) = services.devices.list_devices()
    assert list(device.tokens_per_second) == [
        services.base_models.served_digest(services.base_models.get(None), job.spec.quantization)
    ]
    again = services.jobs.plan({"dataset": job.spec.dataset, "trainer": TRAINER})
    assert again.seconds is not None
    assert again.seconds > 0


def test_the_same_job_twice_gives_the_same_adapter(
    services: Services, supervisor: Supervisor, submit: Callable[..., Job]
) -> None:
    jobs = [submit(**TRAINER), submit(**TRAINER)]
    while supervisor.work():
        pass
    first, second = (services.adapters.get(str(services.jobs.get(job.id).adapter_id)) for job in jobs)
    assert first.digest == second.digest
    assert first.id != second.id


def test_two_supervisors_on_one_row_one_trains(
    services: Services, submit: Callable[..., Job], background: Callable[[Supervisor], threading.Thread]
) -> None:
    job = submit(**TRAINER)
    threads = [background(Supervisor(services, f"worker-{n}", ("gpu",))) for n in (1, 2)]
    for thread in threads:
        thread.join(120)
    assert services.jobs.get(job.id).attempts == 1
    assert kinds(services, job).count("succeeded") == 1


def test_cancel_stops_the_child_within_seconds(
    services: Services,
    supervisor: Supervisor,
    submit: Callable[..., Job],
    background: Callable[[Supervisor], threading.Thread],
) -> None:
    job = submit(**LONG)
    thread = background(supervisor)
    until(lambda: updates(services, job) > 0)
    services.jobs.request_action(job.id, JobAction.CANCEL)
    thread.join(20)
    assert services.jobs.get(job.id).status is JobStatus.CANCELLED
    assert children() == []
    assert services.adapters.list_adapters(None, 10) == ([], False)


def test_pause_writes_a_checkpoint_and_resume_goes_on_from_it(
    services: Services,
    supervisor: Supervisor,
    submit: Callable[..., Job],
    background: Callable[[Supervisor], threading.Thread],
) -> None:
    whole = submit(**(TRAINER | {"train_steps": 40}))
    assert supervisor.work()
    job = submit(**(TRAINER | {"train_steps": 40}))
    thread = background(supervisor)
    until(lambda: updates(services, job) > 0)
    services.jobs.request_action(job.id, JobAction.PAUSE)
    thread.join(30)
    paused = services.jobs.get(job.id)
    assert paused.status in (JobStatus.PAUSED, JobStatus.SUCCEEDED)
    assert [artifact.name for artifact in services.artifacts.list_artifacts(job.id)] == [
        "events.out.tfevents",
        "rows.jsonl",
    ]
    if paused.status is JobStatus.PAUSED:
        assert services.jobs.checkpoints(job.id)[0].update > 0
        services.jobs.request_action(job.id, JobAction.RESUME)
        assert supervisor.work()
        log = [event.message for event in services.jobs.events(job.id, 0, 1_000)[0]]
        assert any(line.startswith("resumed from update") for line in log)
    one, other = (services.adapters.get(str(services.jobs.get(j.id).adapter_id)) for j in (whole, job))
    assert one.digest == other.digest


def test_a_killed_child_is_run_again_from_its_checkpoint(
    services: Services,
    supervisor: Supervisor,
    submit: Callable[..., Job],
    background: Callable[[Supervisor], threading.Thread],
) -> None:
    job = submit(**(LONG | {"train_steps": 60}))
    thread = background(supervisor)
    until(lambda: len(services.jobs.checkpoints(job.id)) > 0)
    for child in children():
        os.kill(child.pid, signal.SIGKILL)
    thread.join(30)
    assert services.jobs.get(job.id).status in (JobStatus.QUEUED, JobStatus.SUCCEEDED)
    supervisor.work()
    assert services.jobs.get(job.id).status is JobStatus.SUCCEEDED
    if services.jobs.get(job.id).attempts == 2:
        requeued = next(e for e in services.jobs.events(job.id, 0, 1_000)[0] if e.kind == "requeued")
        assert "signal 9" in requeued.data["reason"]


def test_a_stored_checkpoint_leaves_the_work_directory(
    services: Services,
    supervisor: Supervisor,
    submit: Callable[..., Job],
    background: Callable[[Supervisor], threading.Thread],
) -> None:
    """The child writes them faster than they are stored. All are stored, and all are removed."""
    job = submit(**(LONG | {"train_steps": 60, "steps_per_checkpoint": 1}))
    thread = background(supervisor)
    until(lambda: kinds(services, job).count("checkpoint") == 60)
    left = list(services.settings.work_path.glob(f"{job.id}/*/checkpoints/update-*"))
    assert len(left) <= 1
    thread.join(60)
    assert services.jobs.get(job.id).status is JobStatus.SUCCEEDED


def test_a_supervisor_that_shuts_down_requeues_its_job_without_a_strike(
    services: Services,
    supervisor: Supervisor,
    submit: Callable[..., Job],
    background: Callable[[Supervisor], threading.Thread],
) -> None:
    job = submit(**LONG)
    thread = background(supervisor)
    until(lambda: updates(services, job) > 0)
    supervisor.leave()
    thread.join(30)
    back = services.jobs.get(job.id)
    assert back.status is JobStatus.QUEUED
    assert len(services.jobs.checkpoints(job.id)) > 0
    assert next(e for e in services.jobs.events(job.id, 0, 1_000)[0] if e.kind == "requeued").data["strikes"] == 0


def test_the_files_of_a_killed_attempt_are_removed_by_the_next(
    services: Services, supervisor: Supervisor, submit: Callable[..., Job]
) -> None:
    job = submit(**(TRAINER | {"train_steps": 1}))
    left = services.settings.work_path / job.id / "0" / "restored" / "weights.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of it")
    assert supervisor.work()
    assert not list(services.settings.work_path.glob("job_*"))


def test_a_job_whose_blob_is_lost_fails_with_a_reason(
    services: Services, supervisor: Supervisor, submit: Callable[..., Job]
) -> None:
    job = submit(**TRAINER)
    rows = services.plans.prepare(job.spec.model_dump(mode="json")).rows
    services.blobs.delete(rows)
    services.blobs.delete(services.datasets.get(job.spec.dataset).digest)
    assert supervisor.work()
    failed = services.jobs.get(job.id)
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert failed.error.code == "blob_lost"


def test_target_modules_that_match_nothing_fail_with_the_childs_reason(
    services: Services, supervisor: Supervisor, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(dataset_jsonl())
    dataset = services.datasets.create(path, "rows.jsonl", None, None, {})[0]
    adapter = {"type": "lora", "target_modules": ["layers.99.self_attn.q_proj"]}
    job = services.jobs.submit({"dataset": dataset.id, "adapter": adapter})
    assert supervisor.work()
    failed = services.jobs.get(job.id)
    assert failed.error is not None
    assert failed.error.code == "target_modules"
    assert failed.error.hint


def test_an_owner_stopped_past_its_lease_changes_nothing_and_publishes_nothing(
    services: Services, submit: Callable[..., Job], tmp_path: Path
) -> None:
    """The whole owner, child included, is held by SIGSTOP past its lease, and let go when an heir has finished."""
    hasty = services.settings.model_copy(update={"lease_seconds": 1.0})
    job = submit(**(TRAINER | {"train_steps": 30}))
    owner = _start_owner(hasty.model_dump(mode="json", exclude_none=True), tmp_path)
    until(lambda: updates(services, job) > 0)
    group = [psutil.Process(owner), *psutil.Process(owner).children(recursive=True)]
    for process in group:
        process.suspend()
    time.sleep(1.5)
    heir = Supervisor(compose(hasty), "heir", ("gpu",))
    assert heir.work()
    before = (
        services.jobs.get(job.id),
        services.jobs.events(job.id, 0, 1_000),
        services.adapters.list_adapters(None, 10),
    )
    assert before[0].status is JobStatus.SUCCEEDED
    for process in group:
        process.resume()
    _pid, status = os.waitpid(owner, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    after = services.jobs.get(job.id), services.jobs.events(job.id, 0, 1_000), services.adapters.list_adapters(None, 10)
    assert after == before
    assert len(after[2][0]) == 1


def _start_owner(settings: dict[str, object], tmp_path: Path) -> int:
    """A process that runs one attempt and ends; its pid."""
    code = (
        "import json, sys\n"
        "from app.composition import compose\nfrom app.settings import Settings\n"
        "from worker.supervisor import Supervisor\n"
        "Supervisor(compose(Settings(**json.load(open(sys.argv[1])))), 'owner', ('gpu',)).work()\n"
    )
    document = tmp_path / "settings.json"
    document.write_text(json.dumps(settings))
    return os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", code, str(document)])


def test_an_idle_child_gets_the_next_job(
    services: Services, supervisor: Supervisor, submit: Callable[..., Job]
) -> None:
    supervisor.warm_up()
    supervisor.warm_up()
    (waiting,) = children()
    job = submit(**TRAINER)
    assert supervisor.work()
    assert services.jobs.get(job.id).status is JobStatus.SUCCEEDED
    assert not waiting.is_running()
    assert children() == []


def test_an_idle_child_that_died_fails_no_job(
    services: Services, supervisor: Supervisor, submit: Callable[..., Job]
) -> None:
    supervisor.warm_up()
    (waiting,) = children()
    waiting.kill()
    until(lambda: waiting.status() == psutil.STATUS_ZOMBIE)
    job = submit(**TRAINER)
    assert supervisor.work()
    done = services.jobs.get(job.id)
    assert (done.status, done.attempts) == (JobStatus.SUCCEEDED, 1)


def test_no_idle_child_runs_after_shutdown_or_without_warm_start(services: Services, supervisor: Supervisor) -> None:
    supervisor.warm_up()
    supervisor.leave()
    supervisor.dismiss()
    supervisor.warm_up()
    assert children() == []
    cold = compose(services.settings.model_copy(update={"warm_start": False}))
    Supervisor(cold, "worker-2", ("gpu",)).warm_up()
    Supervisor(services, "worker-3", ("cpu",)).warm_up()
    cold.close()
    assert children() == []


def test_a_job_starts_from_a_published_adapter(
    services: Services, supervisor: Supervisor, submit: Callable[..., Job], tmp_path: Path
) -> None:
    first = submit(**TRAINER)
    assert supervisor.work()
    name = services.adapters.get(str(services.jobs.get(first.id).adapter_id)).name
    spec: dict[str, Any] = {"dataset": first.spec.dataset, "trainer": TRAINER}

    def going_on(**adapter: object) -> dict[str, Any]:
        return spec | {"adapter": {"type": "lora", "r": 4, "pretrained_adapter_weights": name} | adapter}

    later = services.jobs.submit(going_on())
    assert isinstance(later.spec, TrainSpec)
    assert later.spec.adapter is not None
    assert later.spec.adapter.pretrained_adapter_weights == services.jobs.get(first.id).adapter_id
    assert supervisor.work()
    losses = {job.id: [m.loss for m in services.jobs.metrics(job.id, 0, 100)[0]] for job in (first, later)}
    assert losses[later.id][0] < 0.9 * losses[first.id][0]  # type: ignore[operator]

    for wrong, words in (
        ({"r": 2}, "has r 4, alpha 8"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"use_rslora": True}, "use_rslora False"),
        ({"pretrained_adapter_weights": "nobody"}, "no adapter 'nobody'"),
    ):
        with pytest.raises(InvalidError, match=words) as refused:
            services.jobs.submit(going_on(**wrong))
        assert refused.value.problems[0].loc == ("adapter", "pretrained_adapter_weights")
    services.adapters.delete(name)
    with pytest.raises(InvalidError, match="no adapter"):
        services.jobs.submit(going_on())
