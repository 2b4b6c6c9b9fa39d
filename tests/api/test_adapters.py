"""/adapters: list, read, download, promote and delete."""

import io
import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.composition import Services
from app.domain.adapters import WEIGHTS_FILE, Manifest
from app.domain.errors import NotFoundError
from app.domain.jobs import Lease
from app.domain.tuning_methods import Quantization
from app.services.adapters import DELETED
from app.storage.orphans import STALE_SECONDS
from tests.api.conftest import lease, make_adapter, nothing_left, problem, traces, walk


def test_an_adapter_and_its_manifest(client: TestClient, adapter: str, job: str) -> None:
    document = client.get(f"/adapters/{adapter}").json()
    assert (document["name"], document["job_id"], document["aliases"], document["base_model"]) == (
        "first",
        job,
        ["default"],
        "tiny",
    )
    assert document["manifest"]["dataset_rows"] == 4
    assert client.get("/adapters/first").json() == document
    assert client.get("/adapters").json() == {"data": [document], "has_more": False}


def test_the_archive_holds_the_directory(client: TestClient, adapter: str) -> None:
    response = client.get("/adapters/first/download")
    assert response.headers["content-type"] == "application/zip"
    assert response.headers["content-disposition"] == 'attachment; filename="first.zip"'
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "manifest.json",
        ]
        assert archive.read("adapter_model.safetensors") == b"weights of first"
        assert json.loads(archive.read("manifest.json"))["seed"] == 42


@pytest.fixture
def twin(client: TestClient, served: Services, adapter: str, dataset: str) -> tuple[Lease, Manifest]:
    """A running job named `twin` whose weights equal the first adapter's, and the manifest to publish."""
    client.post("/jobs", json={"dataset": dataset, "name": "twin"})
    leased = lease(served)
    return leased, served.adapters.get(adapter).manifest.model_copy(update={"job_id": leased.job_id})


def test_files_on_disk_are_deleted_with_the_last_adapter_that_has_them(
    client: TestClient, served: Services, adapter: str, twin: tuple[Lease, Manifest], tmp_path: Path
) -> None:
    leased, manifest = twin
    served.adapters.publish(leased, "twin", tmp_path / "adapter", manifest)
    directory = served.settings.cache_path / "adapters" / served.adapters.get(adapter).digest
    assert client.delete("/adapters/first").status_code == 204
    assert (directory / WEIGHTS_FILE["peft"]).is_file()
    assert client.delete("/adapters/twin").status_code == 204
    assert (directory / WEIGHTS_FILE["peft"]).is_file(), "a claim may be judged with it at this moment"
    served.sweep()
    assert directory.exists()
    later(directory.parent / f"{DELETED}{directory.name}")
    served.sweep()
    assert list(directory.parent.glob(f"*{directory.name}*")) == []


def later(path: Path) -> None:
    """Make the directory as old as one that expires."""
    os.utime(path, (time.time() - STALE_SECONDS - 60,) * 2)


def test_files_of_a_deleted_adapter_stay_for_one_that_is_published_with_them_anew(
    client: TestClient, served: Services, adapter: str, twin: tuple[Lease, Manifest], tmp_path: Path
) -> None:
    directory = served.settings.cache_path / "adapters" / served.adapters.get(adapter).digest
    client.delete("/adapters/first")
    leased, manifest = twin
    served.adapters.publish(leased, "twin", tmp_path / "adapter", manifest)
    later(directory.parent / f"{DELETED}{directory.name}")
    served.sweep()
    assert (directory / WEIGHTS_FILE["peft"]).is_file()
    assert not (directory.parent / f"{DELETED}{directory.name}").exists()


def test_a_job_cancelled_before_it_publishes_leaves_nothing_and_takes_nothing(
    client: TestClient, served: Services, twin: tuple[Lease, Manifest], tmp_path: Path
) -> None:
    leased, manifest = twin
    client.post("/jobs/twin/cancel")
    blobs = traces(served)["blobs"]
    assert served.adapters.publish(leased, "twin", tmp_path / "adapter", manifest) is None
    assert traces(served)["blobs"] == blobs
    assert client.get("/adapters/first/download").status_code == 200


def test_a_job_is_not_submitted_under_an_adapters_name(
    client: TestClient, served: Services, adapter: str, dataset: str
) -> None:
    with nothing_left(served):
        refused = client.post("/jobs", json={"dataset": dataset, "name": "first"})
        assert "adapter" in problem(refused, 409, "name_taken")["detail"]


def test_what_was_trained_is_published_under_another_name_where_an_adapter_has_its_own(
    client: TestClient, served: Services, twin: tuple[Lease, Manifest], tmp_path: Path
) -> None:
    leased, manifest = twin
    published = served.adapters.publish(leased, "first", tmp_path / "adapter", manifest)
    assert client.get("/adapters/first-2").json()["id"] == published
    assert client.get("/jobs/twin").json()["status"] == "succeeded"
    warnings = [event for event in client.get("/jobs/twin/events").json()["data"] if event["level"] == "warning"]
    assert [(event["kind"], event["data"]) for event in warnings] == [("name_taken", {"name": "first-2"})]
    with zipfile.ZipFile(io.BytesIO(client.get("/adapters/first-2/download").content)) as archive:
        assert b"# first-2\n" in archive.read("README.md")


def test_promote_delete_and_page(
    client: TestClient, served: Services, adapter: str, dataset: str, tmp_path: Path
) -> None:
    made = [adapter]
    for number in range(4):
        client.post("/jobs", json={"dataset": dataset, "name": f"job-{number}"})
        made.append(make_adapter(served, lease(served), tmp_path / str(number), f"job-{number}"))
    assert walk(client, "/adapters", 2) == made[::-1]
    assert client.post("/adapters/job-2/promote").json()["aliases"] == ["default"]
    assert client.get(f"/adapters/{adapter}").json()["aliases"] == []
    before = traces(served)
    assert client.delete("/adapters/job-2").status_code == 204
    after = traces(served)
    assert (after["adapters"], after["aliases"]) == (before["adapters"] - 1, 0)
    assert after["blobs"] == before["blobs"] - 3
    problem(client.get("/adapters/job-2"), 404, "unknown_adapter")
    with zipfile.ZipFile(io.BytesIO(client.get("/adapters/job-3/download").content)) as archive:
        assert archive.read("adapter_config.json")  # the same bytes as those of the deleted one


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("GET", "/download"), ("POST", "/promote"), ("DELETE", "")])
def test_an_unknown_adapter(readonly_client: TestClient, method: str, path: str) -> None:
    assert (
        "GET /adapters"
        in problem(readonly_client.request(method, f"/adapters/adp_x{path}"), 404, "unknown_adapter")["detail"]
    )


def test_missing_bytes(client: TestClient, served: Services, adapter: str) -> None:
    with served.database.read() as unit:
        row = unit.adapters.find(adapter)
    assert row is not None
    served.blobs.delete(row.files["README.md"])
    with nothing_left(served):
        problem(client.get("/adapters/first/download"), 404, "blob_lost")
    cached = served.settings.cache_path / "adapters"
    shutil.rmtree(cached / row.digest)
    before = set(cached.iterdir())
    with pytest.raises(NotFoundError, match="are gone"):
        served.adapters.on_disk(row.digest)
    assert set(cached.iterdir()) == before


def test_on_disk_it_names_the_served_base_and_in_the_archive_the_revision(
    client: TestClient, served: Services, adapter: str
) -> None:
    found = served.adapters.get(adapter)
    base = served.base_models.get("tiny")
    expected = served.base_models.served_digest(base, Quantization())
    path = served.adapters.on_disk(found.digest) / "adapter_config.json"
    assert json.loads(path.read_text())["base_model_name_or_path"] == expected
    assert served.adapters.config(adapter) == {"peft_type": "LORA", "r": 16}
    with zipfile.ZipFile(io.BytesIO(client.get("/adapters/first/download").content)) as archive:
        assert json.loads(archive.read("adapter_config.json")) == {"peft_type": "LORA", "r": 16}


def test_the_adapters_over_one_served_base_can_be_put_on_a_disk(served: Services, adapter: str) -> None:
    found = served.adapters.get(adapter)
    directory = served.adapters.on_disk(found.digest)
    shutil.rmtree(directory)
    served.adapters.put_on_disk("0" * 64)
    assert not directory.exists()
    served.adapters.put_on_disk(found.manifest.served_base)
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "tiny@1"}')
    served.adapters.put_on_disk(found.manifest.served_base)
    written = json.loads((directory / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == found.manifest.served_base
