"""/jobs: valid and refused specs, idempotency keys, pages, events and metrics."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient

from app.composition import Services
from app.domain.attempts import CheckpointWritten
from app.domain.jobs import Job, JobError
from app.queue import MemoryDoorbell
from tests.api.conftest import CPU, lease, make_adapter, metric, nothing_left, places, problem, traces, walk
from tests.conftest import SHARED, needs_shared_data

SSE = {"Accept": "text/event-stream"}


def test_a_job_is_queued_with_its_plan(client: TestClient, doorbell: MemoryDoorbell, dataset: str) -> None:
    rung: list[str] = []
    doorbell.listen(lambda job_id, kind: rung.append(job_id))
    made = client.post("/jobs", json={"dataset": "rows", "name": "first", "metadata": {"ticket": 7}})
    assert made.status_code == 201
    job = made.json()
    assert made.headers["location"] == f"/jobs/{job['id']}"
    assert (job["status"], job["queue_position"], job["kind"]) == ("queued", 1, "train")
    assert (job["spec"]["dataset"], job["spec"]["base_model"]) == (dataset, "tiny")
    assert job["spec"]["metadata"] == {"ticket": 7}
    assert job["plan"]["rows_trained"] == 4
    assert rung == [job["id"]]
    assert client.get("/jobs/first").json() == client.get(f"/jobs/{job['id']}").json() == job


def test_a_job_has_the_same_fields_by_itself_and_in_the_list(
    client: TestClient, served: Services, dataset: str
) -> None:
    """A waiting, a failed and a running job: each response equals the documented Job, byte for byte."""
    names = ["failed", "running", "waiting"]
    for name in names:
        client.post("/jobs", json={"dataset": "rows", "name": name, "metadata": {"note": "Łódź \u2028"}})
    error = {"code": "out_of_memory", "message": "no room", "hint": None}
    served.attempts.fail(lease(served), JobError.model_validate(error))
    served.attempts.record(lease(served), [metric(1)], 3.0)
    listed = client.get("/jobs").json()["data"]
    assert [job["name"] for job in listed] == names[::-1]
    for job in listed:
        answer = client.get(f"/jobs/{job['id']}")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == client.get(f"/jobs/{job['name']}").json() == job
        assert Job.model_validate_json(answer.content).model_dump_json().encode() == answer.content
    found = {job["name"]: (job["error"], job["progress"]["update"], job["queue_position"]) for job in listed}
    assert found == {"failed": (error, 0, None), "running": (None, 1, None), "waiting": (None, 0, 1)}


def test_a_plan_queues_nothing(client: TestClient, served: Services, dataset: str) -> None:
    client.post("/jobs/plan", json={"dataset": "rows"})  # encodes the rows and caches them
    with nothing_left(served):
        plan = client.post("/jobs/plan", json={"dataset": "rows", "trainer": {"train_steps": 7}})
        assert (plan.status_code, plan.json()["total_updates"], plan.json()["device"]) == (200, 7, "unknown")


def test_a_plan_for_a_card(client: TestClient, dataset: str) -> None:
    plan = client.post("/jobs/plan?device=t4", json={"dataset": "rows"}).json()
    assert (plan["device"], plan["fits"], plan["remedies"]) == ("t4", True, [])
    assert plan["memory"]["total"] < plan["device_bytes"] == int(14.5 * 2**30)
    document = problem(client.post("/jobs/plan?device=a11", json={"dataset": "rows"}), 422, "unknown_device")
    assert places(document) == ["query.device"]
    assert document["errors"][0]["hint"] == "known here: a10, a100-40, h100, l4, t4", "a short name is not corrected"


def test_a_job_that_the_trainer_cannot_hold_is_refused(client: TestClient, served: Services, dataset: str) -> None:
    """The device lacks 100 bytes for batches of four rows. The hints name changes with which the job fits."""
    spec = {"dataset": "rows", "trainer": {"batch_size": 4, "enable_gradient_checkpointing": False}}
    served.devices.report("host", CPU)
    size = client.post("/jobs/plan", json=spec).json()["memory"]["total"] - 100
    served.devices.report("host", CPU.model_copy(update={"bytes": size}))
    client.post("/jobs/plan", json=spec)
    with nothing_left(served):
        document = problem(client.post("/jobs", json=spec), 422, "does_not_fit")
    assert places(document) == ["trainer.enable_gradient_checkpointing", "trainer.batch_size"]
    assert '{"trainer": {"batch_size": 2}}' in document["errors"][1]["hint"]
    assert client.post("/jobs", json={"dataset": "rows", "trainer": {"batch_size": 2}}).status_code == 201


@needs_shared_data
def test_the_users_own_config(client: TestClient, dataset: str) -> None:
    source = SHARED / "seed_config.yaml"
    config = yaml.safe_load(source.read_text())
    made = client.post("/jobs", json=config | {"dataset": "rows", "base_model": "tiny"})
    assert made.status_code == 201, made.text
    assert made.json()["spec"]["trainer"]["gradient_accumulation_steps"] == 16


def test_cancel_pause_and_resume_a_waiting_job(client: TestClient, job: str) -> None:
    for wish, status in (("pause", "paused"), ("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        answer = client.post(f"/jobs/{job}/{wish}")
        assert (answer.status_code, answer.json()["status"]) == (200, status)
    assert client.post(f"/jobs/{job}/cancel").json()["status"] == "cancelled"
    for wish in ("pause", "resume"):
        assert "cancelled" in problem(client.post(f"/jobs/{job}/{wish}"), 409, "wrong_state")["detail"]


def test_an_action_on_a_running_job_is_requested(client: TestClient, served: Services, job: str) -> None:
    leased = lease(served)
    assert client.post(f"/jobs/{job}/pause").json()["status"] == "pausing"
    assert client.post(f"/jobs/{job}/cancel").json()["status"] == "cancelling"
    served.attempts.release(leased, "stopped", strike=False)
    assert client.get(f"/jobs/{job}").json()["status"] == "cancelled"


def test_a_finished_job_cannot_be_cancelled(client: TestClient, served: Services, adapter: str, job: str) -> None:
    with nothing_left(served):
        assert "succeeded" in problem(client.post(f"/jobs/{job}/cancel"), 409, "wrong_state")["detail"]


def test_a_failed_job_has_a_reason_and_cannot_be_cancelled(client: TestClient, served: Services, job: str) -> None:
    error = {"code": "out_of_memory", "message": "no room", "hint": "a smaller batch"}
    served.attempts.fail(lease(served), JobError.model_validate(error))
    document = client.get(f"/jobs/{job}").json()
    assert (document["status"], document["error"]) == ("failed", error)
    problem(client.post(f"/jobs/{job}/cancel"), 409, "wrong_state")


@pytest.mark.parametrize("path", ["", "/events", "/metrics", "/checkpoints"])
def test_an_unknown_job(readonly_client: TestClient, path: str) -> None:
    problem(readonly_client.get(f"/jobs/job_nowhere{path}"), 404, "unknown_job")


@pytest.mark.parametrize("wish", ["cancel", "pause", "resume"])
def test_an_action_on_an_unknown_job(readonly_client: TestClient, wish: str) -> None:
    problem(readonly_client.post(f"/jobs/job_nowhere/{wish}"), 404, "unknown_job")


def test_a_job_is_deleted_once_it_has_ended(client: TestClient, dataset: str) -> None:
    spec = {"dataset": dataset, "name": "first"}
    job = client.post("/jobs", json=spec).json()["id"]
    assert "cancel it first" in problem(client.delete("/jobs/first"), 409, "wrong_state")["detail"]
    client.post("/jobs/first/cancel")
    problem(client.post("/jobs", json=spec), 409, "name_taken")
    deleted = client.delete(f"/jobs/{job}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    for path in ("", "/events", "/metrics", "/checkpoints", "/artifacts"):
        problem(client.get(f"/jobs/first{path}"), 404, "unknown_job")
    problem(client.delete("/jobs/first"), 404, "unknown_job")
    assert client.post("/jobs", json=spec).status_code == 201


# Bad specs.


@pytest.mark.parametrize(
    ("change", "code", "place", "words"),
    [
        ({"epoch": 3}, "invalid_spec", "epoch", "did you mean 'trainer.epochs'?"),
        ({"trainer": {"epoch": 3}}, "invalid_spec", "trainer.epoch", "did you mean 'epochs'?"),
        ({"trainer": {"learning_rate": -1}}, "invalid_spec", "trainer.learning_rate", "greater than 0"),
        ({"trainer": {"learning_rate": "nan"}}, "invalid_spec", "trainer.learning_rate", "finite"),
        ({"quantization": {"bits": 3}}, "invalid_spec", "quantization.bits", "4 or 8"),
        ({"base_model": "gpt-5"}, "unknown_base_model", "base_model", "tiny"),
        ({"base_model": "/etc/passwd"}, "invalid_spec", "base_model", "a path or a URL"),
        ({"base_model": "../tiny"}, "invalid_spec", "base_model", "a path or a URL"),
        ({"base_model": "https://example.org/model"}, "invalid_spec", "base_model", "a path or a URL"),
        ({"base_model": "s3://bucket/model"}, "invalid_spec", "base_model", "a path or a URL"),
        ({"base_model": "file:///model"}, "invalid_spec", "base_model", "a path or a URL"),
        ({"dataset": None}, "invalid_spec", "dataset", "required"),
        ({"dataset": ""}, "invalid_spec", "dataset", "1 to 200 characters"),
        ({"kind": "distill"}, "not_yet_supported", "kind", "train"),
        ({"kind": "evaluate"}, "invalid_spec", "kind", "POST /evaluations"),
        ({"kind": "synthesize"}, "invalid_spec", "kind", "POST /datasets/synthesize"),
        ({"kind": "tain"}, "invalid_spec", "kind", "did you mean 'train'?"),
        ({"backend": {"processes": 2}}, "not_yet_supported", "backend.processes", "one process"),
        ({"preprocessing": {"global_max_sequence_length": 4_096}}, "invalid_spec",
         "preprocessing.global_max_sequence_length", "context of 512"),
        ({"input_features": [{"name": "text"}]}, "invalid_spec", "input_features.0.name", "'claim'"),
        ({"prompt": {"template": "no placeholder"}}, "invalid_spec", "prompt", "{claim}"),
        ({"metadata": {"a": "b" * 20_000}}, "invalid_spec", "metadata", "16,384"),
        ({"name": "a b"}, "invalid_spec", "name", "pattern"),
        ({"trust_remote_code": True}, "invalid_spec", "trust_remote_code", "no code"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", ["/jobs", "/jobs/plan"])
def test_a_bad_spec(
    readonly_client: TestClient, route: str, change: dict[str, Any], code: str, place: str, words: str
) -> None:
    document = problem(readonly_client.post(route, json={"dataset": "rows"} | change), 422, code)
    assert place in places(document)
    assert words in json.dumps(document, ensure_ascii=False)
    assert place in document["detail"] or code == "unknown_base_model"


def test_rows_that_cannot_fit(client: TestClient, dataset: str) -> None:
    spec = {"dataset": "rows", "preprocessing": {"global_max_sequence_length": 64}}
    problem(client.post("/jobs", json=spec), 422)
    assert client.get("/jobs").json()["data"] == []


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_a_learning_rate_that_is_no_number(readonly_client: TestClient, literal: str) -> None:
    body = f'{{"dataset": "rows", "trainer": {{"learning_rate": {literal}}}, "metadata": {{"note": [{literal}]}}}}'
    response = readonly_client.post("/jobs", content=body, headers={"Content-Type": "application/json"})
    assert places(problem(response, 422, "invalid_spec")) == ["trainer.learning_rate", "metadata.note.0"]


def test_an_unknown_dataset(readonly_client: TestClient) -> None:
    for route in ("/jobs", "/jobs/plan"):
        document = problem(readonly_client.post(route, json={"dataset": "ds_nowhere"}), 404, "unknown_dataset")
        assert places(document) == ["dataset"]


def test_a_name_that_is_taken(client: TestClient, served: Services, dataset: str) -> None:
    client.post("/jobs", json={"dataset": "rows", "name": "first"})
    with nothing_left(served):
        problem(client.post("/jobs", json={"dataset": "rows", "name": "first"}), 409, "name_taken")


# Idempotency.


def keyed(client: TestClient, key: str, **spec: Any) -> Any:
    return client.post("/jobs", json={"dataset": "rows"} | spec, headers={"Idempotency-Key": key})


def test_the_same_key_and_body_give_the_first_answer_again(client: TestClient, served: Services, dataset: str) -> None:
    first = keyed(client, "one")
    client.post(f"/jobs/{first.json()['id']}/cancel")
    again = keyed(client, "one")
    assert (again.status_code, again.json(), again.headers["location"]) == (
        201,
        first.json(),
        first.headers["location"],
    )
    assert traces(served)["jobs"] == 1
    assert keyed(client, "two").json()["id"] != first.json()["id"]


def test_the_same_key_with_another_body(client: TestClient, served: Services, dataset: str) -> None:
    keyed(client, "one")
    with nothing_left(served):
        document = problem(keyed(client, "one", seed=1), 422, "idempotency_key_reused")
        assert places(document) == ["header.Idempotency-Key"]


def test_a_refused_request_does_not_use_its_key_up(client: TestClient, dataset: str) -> None:
    problem(keyed(client, "one", dataset="nowhere"), 404)
    assert keyed(client, "one").status_code == 201


def test_requests_with_one_key_at_once_make_one_job(client: TestClient, served: Services, dataset: str) -> None:
    answers: list[Any] = []
    ready = threading.Barrier(6)

    def post() -> None:
        ready.wait()
        answers.append(keyed(client, "one"))

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [answer.json()["id"] for answer in answers if answer.status_code == 201]
    assert made
    assert len(set(made)) == 1
    for answer in answers:
        if answer.status_code != 201:
            problem(answer, 409, "request_under_way")
    assert traces(served)["jobs"] == 1


@pytest.mark.parametrize("key", ["", "a" * 256, "tab\there"])
def test_a_bad_key(readonly_client: TestClient, key: str) -> None:
    problem(readonly_client.post("/jobs", json={"dataset": "rows"}, headers={"Idempotency-Key": key}), 422)


# Lists.


@pytest.fixture
def many(client: TestClient, dataset: str) -> list[str]:
    return [client.post("/jobs", json={"dataset": "rows"}).json()["id"] for _ in range(25)]


def test_25_jobs_are_paged_newest_first(client: TestClient, many: list[str]) -> None:
    assert walk(client, "/jobs", 10) == many[::-1]
    assert walk(client, "/jobs", 25) == many[::-1]
    first = client.get("/jobs").json()
    assert (len(first["data"]), first["has_more"]) == (20, True)
    assert client.get("/jobs", params={"after": many[0]}).json() == {"data": [], "has_more": False}
    client.post(f"/jobs/{many[3]}/cancel")
    assert [job["id"] for job in client.get("/jobs?status=cancelled").json()["data"]] == [many[3]]
    positions = {job["id"]: job["queue_position"] for job in client.get("/jobs?limit=100").json()["data"]}
    assert [positions[job] for job in (*many[:3], many[3], many[4])] == [1, 2, 3, None, 4]


def test_metrics_are_paged_oldest_first(client: TestClient, served: Services, job: str) -> None:
    served.attempts.record(lease(served), [metric(update) for update in range(1, 26)], 3.0)
    assert walk(client, f"/jobs/{job}/metrics", 10, "update") == list(range(1, 26))
    document = client.get(f"/jobs/{job}").json()["progress"]
    assert (document["update"], document["total_updates"], document["loss"], document["eta_seconds"]) == (
        25,
        25,
        1.5,
        3.0,
    )


def test_a_skipped_update_has_no_loss(client: TestClient, served: Services, job: str) -> None:
    skipped = metric(1, loss=None).model_copy(update={"skipped": True, "grad_norm": None})
    served.attempts.record(lease(served), [skipped], None)
    row = client.get(f"/jobs/{job}/metrics").json()["data"][0]
    assert (row["loss"], row["grad_norm"], row["skipped"]) == (None, None, True)


def test_checkpoints_newest_first(client: TestClient, served: Services, job: str, tmp_path: Path) -> None:
    leased = lease(served)
    for update in (2, 4):
        folder = tmp_path / str(update)
        folder.mkdir()
        (folder / "state").write_bytes(b"state %d" % update)
        served.attempts.checkpoint(leased, CheckpointWritten(update=update, path=folder, digest=str(update) * 64))
    found = client.get(f"/jobs/{job}/checkpoints").json()
    assert [row["update"] for row in found["data"]] == [4, 2]
    assert not found["has_more"]


# Events.


def stream_events(client: TestClient, job: str, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Read the event stream of an ended job to its end."""
    events = []
    with client.stream("GET", f"/jobs/{job}/events", headers=SSE | (headers or {})) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        for block in "".join(response.iter_text()).split("\n\n")[:-1]:
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            data = json.loads(fields["data"])
            assert (int(fields["id"]), fields["event"]) == (data["seq"], data["kind"])
            events.append(data)
    return events


def test_events_are_numbered_without_gaps_and_paged(client: TestClient, served: Services, job: str) -> None:
    leased = lease(served)
    for number in range(23):
        served.attempts.add_event(leased, "note", f"number {number}")
    assert walk(client, f"/jobs/{job}/events", 10, "seq") == list(range(1, 26))
    kinds = [event["kind"] for event in client.get(f"/jobs/{job}/events").json()["data"]]
    assert kinds[:3] == ["queued", "started", "note"]


def test_the_stream_of_a_finished_job_ends(client: TestClient, job: str) -> None:
    client.post(f"/jobs/{job}/cancel")
    events = stream_events(client, job)
    assert [event["kind"] for event in events] == ["queued", "cancelled"]
    assert events == client.get(f"/jobs/{job}/events").json()["data"]
    assert stream_events(client, job, {"Last-Event-ID": "1"}) == events[1:]
    assert client.get(f"/jobs/{job}/events?after=1", headers=SSE | {"Last-Event-ID": "0"}).text.startswith("id: 1\n")


def test_a_client_that_has_the_last_event_gets_204(client: TestClient, job: str) -> None:
    client.post(f"/jobs/{job}/cancel")
    response = client.get(f"/jobs/{job}/events", headers=SSE | {"Last-Event-ID": "2"})
    assert (response.status_code, response.content) == (204, b"")


@pytest.mark.parametrize("last", ["abc", "-1", "1.5", "²", "9" * 30, ""])
def test_a_bad_last_event_id(readonly_client: TestClient, last: str) -> None:
    headers = {b"Accept": b"text/event-stream", b"Last-Event-ID": last.encode("latin-1")}
    assert places(problem(readonly_client.get("/jobs/x/events", headers=headers), 422)) == ["header.Last-Event-ID"]


def test_the_stream_of_an_unknown_job(readonly_client: TestClient) -> None:
    problem(readonly_client.get("/jobs/job_nowhere/events", headers=SSE), 404, "unknown_job")


def test_a_published_adapter_is_named_in_its_job(
    client: TestClient, served: Services, job: str, tmp_path: Path
) -> None:
    published = make_adapter(served, lease(served), tmp_path / "adapter", "first")
    document = client.get(f"/jobs/{job}").json()
    assert (document["status"], document["adapter_id"], document["queue_position"]) == ("succeeded", published, None)
    assert document["finished_at"].endswith(("Z", "+00:00"))
