"""Base models, devices, health and metrics of a deployment."""

import pytest
from starlette.testclient import TestClient

from app.composition import Services
from app.domain.devices import DeviceDescription
from app.domain.errors import UnavailableError
from app.main import create_app
from tests.api.conftest import HOST, places, problem

CPU = DeviceDescription(type="cpu", model="a cpu", bytes=1 << 33, cores=2, queues=("gpu", "cpu"))


def test_base_models(client: TestClient) -> None:
    (model,) = client.get("/base-models").json()["data"]
    assert (model["name"], model["default"], model["context_length"]) == ("tiny", True, 512)


def test_devices(client: TestClient, served: Services) -> None:
    assert client.get("/devices").json() == {"data": [], "has_more": False}
    served.devices.report("host", CPU)
    (device,) = client.get("/devices").json()["data"]
    assert (device["name"], device["online"], device["queues"]) == ("host", True, ["gpu", "cpu"])


def test_devices_show_the_reserved_bytes_of_each_tenant(client: TestClient, served: Services) -> None:
    served.devices.report("host/gpu", CPU)
    served.ledger.reserve_for_inference("host", "server", 1 << 32)
    reservation = served.ledger.reserve_for_training("host", "trainer", "job_1", 1 << 33, 1 << 33).reservation
    assert reservation is not None
    served.ledger.set_expected_end(reservation, 60.0)
    (device,) = client.get("/devices").json()["data"]
    inference, training = sorted(device["reservations"], key=lambda one: one["tenant"])
    nothing = {"policy": None, "job_id": None, "ends_in": None}
    assert inference == {"tenant": "inference", "bytes": 1 << 32, **nothing}
    assert 55 < training.pop("ends_in") <= 60
    assert training == {"tenant": "training", "bytes": 1 << 33, "policy": "yield", "job_id": "job_1"}


def test_a_job_that_is_late_ends_in_no_time(client: TestClient, served: Services) -> None:
    served.devices.report("host/gpu", CPU)
    reservation = served.ledger.reserve_for_training("host", "trainer", "job_1", 1 << 33, 1 << 33).reservation
    assert reservation is not None
    served.ledger.set_expected_end(reservation, -60.0)
    (device,) = client.get("/devices").json()["data"]
    assert [one["ends_in"] for one in device["reservations"]] == [0.0]


def test_liveness_does_not_check_other_parts(readonly_client: TestClient) -> None:
    assert readonly_client.get("/health/live").json() == {"status": "live"}


def test_ready_names_what_is_missing(readonly_client: TestClient) -> None:
    """This deployment has a base model, but no trainer and no inference."""
    response = readonly_client.get("/health/ready")
    document = problem(response, 503, "not_ready")
    assert places(document) == ["trainer", "inference"]
    assert all(error["hint"] for error in document["errors"])
    assert response.headers["retry-after"] == "2"


def test_readiness_distinguishes_suspended_from_starting_inference(
    client: TestClient, served: Services, readonly_client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starting() -> None:
        raise UnavailableError("the inference engine is starting", code="inference_away")

    served.devices.report("host", CPU)
    monkeypatch.setattr(served.generator, "check", starting)
    (starts,) = problem(client.get("/health/ready"), 503, "not_ready")["errors"]
    (_, away) = problem(readonly_client.get("/health/ready"), 503, "not_ready")["errors"]
    assert (starts["loc"], starts["message"]) == (["inference"], "the inference engine is starting")
    assert "does not answer" in away["message"]


def test_ready(client: TestClient, served: Services) -> None:
    assert client.get("/health/ready").status_code == 503
    served.devices.report("host", CPU)
    assert client.get("/health/ready").json() == {"status": "ready"}


def test_suspended_inference_counts_as_available(services: Services) -> None:
    """It resumes by itself. If the API were unready meanwhile, a load balancer would cut off the jobs' routes."""
    services.devices.report("host", CPU)
    with TestClient(create_app(services), base_url=HOST) as client:
        assert places(problem(client.get("/health/ready"), 503, "not_ready")) == ["inference"]
        services.ledger.reserve_for_training("host", "trainer", "job_1", None, 1 << 33)
        assert client.get("/health/ready").status_code == 200
        services.ledger.release("host", "trainer")
        assert client.get("/health/ready").status_code == 503


def test_metrics_are_in_the_text_format(readonly_client: TestClient) -> None:
    response = readonly_client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "# HELP process_" in response.text
