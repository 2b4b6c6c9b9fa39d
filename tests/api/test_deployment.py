"""What this deployment has and how it does: base models, devices, health, metrics."""

from starlette.testclient import TestClient

from app.composition import Services
from app.domain.devices import DeviceDescription
from tests.api.conftest import places, problem

CPU = DeviceDescription(type="cpu", model="a cpu", bytes=1 << 33, cores=2, queues=("gpu", "cpu"))


def test_base_models(client: TestClient) -> None:
    (model,) = client.get("/base-models").json()["data"]
    assert (model["name"], model["default"], model["context_length"]) == ("tiny", True, 512)


def test_devices(client: TestClient, served: Services) -> None:
    assert client.get("/devices").json() == {"data": [], "has_more": False}
    served.devices.report("host", CPU)
    (device,) = client.get("/devices").json()["data"]
    assert (device["name"], device["online"], device["queues"]) == ("host", True, ["gpu", "cpu"])


def test_live_says_nothing_of_the_other_parts(door: TestClient) -> None:
    assert door.get("/health/live").json() == {"status": "live"}


def test_ready_names_what_is_missing(door: TestClient) -> None:
    """This deployment has a base model, and nobody who trains or answers."""
    response = door.get("/health/ready")
    document = problem(response, 503, "not_ready")
    assert places(document) == ["trainer", "inference"]
    assert all(error["hint"] for error in document["errors"])
    assert response.headers["retry-after"] == "2"


def test_ready(client: TestClient, served: Services) -> None:
    assert client.get("/health/ready").status_code == 503
    served.devices.report("host", CPU)
    assert client.get("/health/ready").json() == {"status": "ready"}


def test_metrics_are_in_the_text_format(door: TestClient) -> None:
    response = door.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "# HELP process_" in response.text
