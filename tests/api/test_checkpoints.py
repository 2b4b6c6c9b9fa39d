"""/jobs/{job}/checkpoints and /jobs/{job}/artifacts: retention, publication and download."""

import io
import json
import time
import zipfile
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.composition import Services
from app.domain.adapters import CONFIG_FILE, WEIGHTS_FILE
from app.domain.attempts import CheckpointWritten
from app.domain.jobs import JobError
from tests.api.conftest import lease, make_adapter, make_checkpoint, nothing_left, problem, traces, write_adapter

ROUTE = "/jobs/{}/checkpoints/{}/publish"


def list_updates(client: TestClient, job: str) -> list[tuple[int, bool]]:
    """(update, whether it is the best) of a job's checkpoints."""
    return [(row["update"], row["best"]) for row in client.get(f"/jobs/{job}/checkpoints").json()["data"]]


def test_the_last_two_and_the_best_are_kept(client: TestClient, served: Services, job: str, tmp_path: Path) -> None:
    leased = lease(served)
    for update, loss in ((1, 0.9), (2, 0.5), (3, None), (4, 0.7), (5, 0.5)):
        make_checkpoint(served, leased, tmp_path / str(update), update, loss)
    assert list_updates(client, job) == [(5, False), (4, False), (2, True)]
    make_checkpoint(served, leased, tmp_path / "6", 6, 0.4)
    assert list_updates(client, job) == [(6, True), (5, False)]


def test_a_checkpoint_becomes_an_adapter_of_its_own(
    client: TestClient, served: Services, job: str, tmp_path: Path
) -> None:
    leased = lease(served)
    make_checkpoint(served, leased, tmp_path / "4", 4)
    made = client.post(ROUTE.format(job, 4), json={"name": "early"})
    assert made.status_code == 201, made.text
    adapter = made.json()
    assert made.headers["location"] == f"/adapters/{adapter['id']}"
    assert client.get("/adapters/early").json() == adapter
    assert (adapter["job_id"], adapter["manifest"]["metrics"], adapter["aliases"]) == (job, {"updates": 4}, [])
    directory = served.adapters.on_disk(adapter["digest"])
    assert (directory / WEIGHTS_FILE["peft"]).read_bytes() == (tmp_path / "4" / WEIGHTS_FILE["peft"]).read_bytes()
    archive = zipfile.ZipFile(io.BytesIO(client.get("/adapters/early/download").content))
    assert adapter["bytes"] == sum(file.file_size for file in archive.infolist())
    published_event = client.get(f"/jobs/{job}/events").json()["data"][-1]
    assert (published_event["kind"], published_event["data"]["adapter_id"]) == ("checkpoint_published", adapter["id"])

    make_adapter(served, leased, tmp_path / "last", "last")
    assert client.get(f"/jobs/{job}").json()["status"] == "succeeded"
    named = client.get(f"/jobs/{job}").json()["name"]
    assert client.post(ROUTE.format(job, 4), json={}).json()["name"] == f"{named}-4"


def test_blobs_that_an_adapter_and_a_checkpoint_share_are_deleted_with_the_last_of_them(
    client: TestClient, served: Services, job: str, tmp_path: Path
) -> None:
    leased = lease(served)
    make_checkpoint(served, leased, tmp_path / "1", 1)
    weights = served.blobs.put_file(tmp_path / "1" / WEIGHTS_FILE["peft"]).digest
    config = served.blobs.put_file(tmp_path / "1" / CONFIG_FILE["peft"]).digest
    for name in ("one", "two"):
        assert client.post(ROUTE.format(job, 1), json={"name": name}).status_code == 201
    client.delete("/adapters/one")
    for update in (2, 3):
        make_checkpoint(served, leased, tmp_path / str(update), update)
    assert list_updates(client, job) == [(3, False), (2, False)]
    assert served.blobs.exists(weights)
    client.delete("/adapters/two")
    assert not served.blobs.exists(weights)
    assert served.blobs.exists(config), "the checkpoints that are left have the same one"


def test_a_keyed_publication_is_done_once(client: TestClient, served: Services, job: str, tmp_path: Path) -> None:
    leased, headers = lease(served), {"Idempotency-Key": "once"}
    for update in (1, 2):
        make_checkpoint(served, leased, tmp_path / str(update), update)
    first = client.post(ROUTE.format(job, 1), json={"name": "early"}, headers=headers)
    again = client.post(ROUTE.format(job, 1), json={"name": "early"}, headers=headers)
    assert (again.status_code, again.json()) == (first.status_code, first.json())
    other = client.post(ROUTE.format(job, 2), json={"name": "early"}, headers=headers)
    problem(other, 422, "idempotency_key_reused")


def test_what_cannot_be_published(client: TestClient, served: Services, job: str, tmp_path: Path) -> None:
    leased = lease(served)
    make_checkpoint(served, leased, tmp_path / "1", 1)
    served.attempts.checkpoint(
        leased, CheckpointWritten(update=2, path=write_adapter(tmp_path / "2", "older"), digest="2" * 64)
    )
    assert client.post(ROUTE.format(job, 1), json={"name": "taken"}).status_code == 201
    before = traces(served)
    assert "it has: 2, 1" in problem(client.post(ROUTE.format(job, 3), json={}), 404, "unknown_checkpoint")["detail"]
    problem(client.post(ROUTE.format("job_nowhere", 1), json={}), 404, "unknown_job")
    problem(client.post(ROUTE.format(job, 2), json={}), 409, "not_publishable")
    problem(client.post(ROUTE.format(job, 1), json={"name": "a name"}), 422)
    problem(client.post(ROUTE.format(job, 1), json={"nmae": "early"}), 422)
    problem(client.post(ROUTE.format(job, 0), json={}), 422)
    assert traces(served) == before
    problem(client.post(ROUTE.format(job, 1), json={"name": "taken"}), 409, "name_taken")


def test_the_name_of_a_job_that_has_not_ended_is_kept_for_its_adapter(
    client: TestClient, served: Services, job: str, tmp_path: Path
) -> None:
    leased = lease(served)
    make_checkpoint(served, leased, tmp_path / "1", 1)
    own = {"name": client.get(f"/jobs/{job}").json()["name"]}
    with nothing_left(served):
        problem(client.post(ROUTE.format(job, 1), json=own), 409, "name_taken")
    served.attempts.fail(leased, JobError(code="x", message="x"))
    assert client.post(ROUTE.format(job, 1), json=own).status_code == 201


@pytest.mark.parametrize("ending", ["failed", "cancelled"])
def test_the_checkpoints_of_an_ended_job_are_deleted_after_their_ttl(
    client: TestClient, served: Services, job: str, tmp_path: Path, ending: str
) -> None:
    leased = lease(served)
    make_checkpoint(served, leased, tmp_path / "1", 1)
    weights = served.blobs.put_file(tmp_path / "1" / WEIGHTS_FILE["peft"]).digest
    assert served.checkpoints.expire(0) == 0, "it still runs"
    if ending == "failed":
        served.attempts.fail(leased, JobError(code="x", message="x"))
    else:
        client.post(f"/jobs/{job}/cancel")
        served.attempts.release(leased, "stopped", strike=False)
    assert served.checkpoints.expire(1) == 0, "it has just ended"
    assert list_updates(client, job) == [(1, False)]
    time.sleep(0.01)
    assert served.checkpoints.expire(0) == 1
    assert list_updates(client, job) == []
    assert not served.blobs.exists(weights)
    problem(client.post(ROUTE.format(job, 1), json={}), 404, "unknown_checkpoint")


# Artifacts.


def test_artifacts_are_listed_and_downloaded(client: TestClient, served: Services, job: str, tmp_path: Path) -> None:
    leased = lease(served)
    for name, content in (("rows.jsonl", '{"line": 1}\n'), ("other.txt", "x")):
        (tmp_path / name).write_text(content)
        served.artifacts.put(leased, tmp_path / name)
    listed = client.get(f"/jobs/{job}/artifacts").json()
    assert [(row["name"], row["bytes"]) for row in listed["data"]] == [("other.txt", 1), ("rows.jsonl", 12)]
    assert not listed["has_more"]
    file = client.get(f"/jobs/{job}/artifacts/rows.jsonl")
    assert file.headers["content-disposition"] == 'attachment; filename="rows.jsonl"'
    assert json.loads(file.content) == {"line": 1}


def test_the_next_attempt_replaces_the_artifacts_of_the_last(
    client: TestClient, served: Services, job: str, tmp_path: Path
) -> None:
    leased = lease(served)
    (tmp_path / "rows.jsonl").write_text("old")
    served.artifacts.put(leased, tmp_path / "rows.jsonl")
    old = client.get(f"/jobs/{job}/artifacts").json()["data"][0]["digest"]
    with nothing_left(served):
        served.artifacts.put(leased, tmp_path / "rows.jsonl")  # the same file again
        assert served.blobs.exists(old)
        (tmp_path / "rows.jsonl").write_text("new")
        served.artifacts.put(leased, tmp_path / "rows.jsonl")
    assert client.get(f"/jobs/{job}/artifacts/rows.jsonl").text == "new"
    assert not served.blobs.exists(old)


def test_missing_artifacts(client: TestClient, served: Services, job: str, tmp_path: Path) -> None:
    assert client.get(f"/jobs/{job}/artifacts").json() == {"data": [], "has_more": False}
    assert "none yet" in problem(client.get(f"/jobs/{job}/artifacts/rows.jsonl"), 404, "unknown_artifact")["detail"]
    problem(client.get("/jobs/job_nowhere/artifacts"), 404, "unknown_job")
    problem(client.get("/jobs/job_nowhere/artifacts/rows.jsonl"), 404, "unknown_job")
    (tmp_path / "rows.jsonl").write_text("lost")
    served.artifacts.put(lease(served), tmp_path / "rows.jsonl")
    served.blobs.delete(client.get(f"/jobs/{job}/artifacts").json()["data"][0]["digest"])
    problem(client.get(f"/jobs/{job}/artifacts/rows.jsonl"), 404, "blob_lost")
