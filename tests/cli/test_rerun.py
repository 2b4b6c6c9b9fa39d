"""`veritune rerun` trains the same adapter again, or refuses if the base model or the dataset has changed."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from app.cli import application
from app.cli.errors import CommandError
from app.cli.rerun import rerun
from app.composition import Services, compose
from app.domain.jobs import JobStatus
from app.domain.plans import Plan
from app.domain.specs import TrainSpec
from tests.api.conftest import listening, nothing_left
from tests.conftest import dataset_jsonl
from worker.supervisor import Supervisor

SPEC = {
    "name": "first",
    "adapter": {"type": "lora", "r": 4, "dropout": 0.1},
    "preprocessing": {"split": {"probabilities": [0.6, 0.3, 0.1]}},
    "trainer": {"train_steps": 4, "effective_batch_size": 3, "learning_rate": 1e-2},
    "seed": 7,
}


@pytest.fixture
def client(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """A client of a service in which the job `first` has been submitted."""
    monkeypatch.setenv("VERITUNE_THREADS", "1")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(dataset_jsonl(12))
    dataset = services.datasets.create(path, path.name, None, "rows", {})[0]
    services.jobs.submit(SPEC | {"dataset": dataset.id})
    with listening(services) as found:
        yield found


def work(services: Services, reference: str) -> str:
    """Train the next job; return the id of its adapter."""
    assert Supervisor(services, "worker-1", ("gpu",)).work()
    job = services.jobs.get(reference)
    assert job.status is JobStatus.SUCCEEDED, job.error
    return str(job.adapter_id)


@pytest.mark.slow
def test_the_same_spec_data_and_seed_give_the_same_adapter(services: Services, client: httpx.Client) -> None:
    """The deployment's default sequence length has changed in between; rerun pins the old one."""
    first = services.adapters.get(work(services, "first"))
    shorter = compose(services.settings.model_copy(update={"max_sequence_length": 64}), doorbell=services.doorbell)
    with listening(shorter) as changed:
        job, manifest = rerun(changed, "first")
    shorter.close()
    again = services.adapters.get(work(services, job["id"]))
    assert again.digest == first.digest
    assert manifest == first.manifest.model_dump(mode="json")
    assert again.manifest.environment == first.manifest.environment
    assert first.manifest.environment is not None
    assert first.manifest.environment.threads == 1


def test_the_new_job_has_the_old_jobs_spec(services: Services, client: httpx.Client) -> None:
    job, manifest = rerun(client, "first")
    first, again = services.jobs.get("first"), services.jobs.get(job["id"])
    assert manifest is None
    assert isinstance(first.plan, Plan)
    assert isinstance(first.spec, TrainSpec)
    assert again.plan == first.plan
    assert again.name != first.name
    length = first.plan.max_sequence_length
    pinned = first.spec.preprocessing.model_copy(update={"global_max_sequence_length": length})
    assert again.spec == first.spec.model_copy(update={"name": None, "preprocessing": pinned})


@pytest.mark.slow
def test_a_changed_base_model_is_refused(services: Services, client: httpx.Client) -> None:
    work(services, "first")
    described = services.base_models.describe(services.base_models.get("tiny"))
    with services.database.write() as unit:
        row = unit.base_models.get("tiny")
        assert row is not None
        row.digest = "0" * 64
        row.description = described.model_copy(update={"digest": "0" * 64}).model_dump(mode="json")
    with nothing_left(services), pytest.raises(CommandError, match="no longer the base model"):
        rerun(client, "first")


def test_the_command_prints_the_new_job_or_the_error(
    services: Services, client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERITUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VERITUNE_PORT", str(client.base_url.port))
    runner = CliRunner()
    done = runner.invoke(application, ["rerun", "first"])
    assert done.exit_code == 0, done.output
    assert services.jobs.get(done.stdout.split()[0]).status is JobStatus.QUEUED
    assert "there is no job 'nowhere'" in runner.invoke(application, ["rerun", "nowhere"]).stderr
    monkeypatch.setenv("VERITUNE_PORT", "1")
    away = runner.invoke(application, ["rerun", "first"])
    assert away.exit_code == 1
    assert "no service answers at http://127.0.0.1:1" in away.stderr
