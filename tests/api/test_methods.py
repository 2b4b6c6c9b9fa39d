"""HEAD gets the response of GET without the body. A trailing slash makes no difference."""

import httpx
import pytest
from starlette.testclient import TestClient

from app.composition import Services
from tests.api.conftest import post_file, problem
from tests.api.test_documentation import METHODS
from tests.conftest import dataset_jsonl
from tests.waiting import until

PAGES = ["/docs", "/openapi.json", "/static/swagger/swagger-ui.css"]


def test_head_is_answered_on_every_get_route_as_get_is(readonly_client: TestClient) -> None:
    paths = [path for path, found in readonly_client.get("/openapi.json").json()["paths"].items() if "get" in found]
    assert len(paths) > 15
    for path in (*PAGES, *(path.replace("{", "").replace("}", "") for path in paths)):
        head, got = readonly_client.head(path), readonly_client.get(path)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers["content-type"] == got.headers["content-type"], path
        if path != "/metrics":  # its numbers change between the requests
            assert head.headers.get("content-length") == got.headers.get("content-length"), path


def test_head_without_a_get_route_is_refused(readonly_client: TestClient) -> None:
    answer = readonly_client.head("/predict")
    assert (answer.status_code, answer.content) == (405, b"")
    assert readonly_client.put("/jobs").headers["allow"] == "GET, HEAD, POST"


def test_head_through_a_socket(server: httpx.Client) -> None:
    """The connection serves the next request, because HEAD's response has no body."""
    for _ in range(3):
        head = server.head("/health/live")
        assert (head.status_code, head.headers["content-length"], head.content) == (200, "17", b"")
    assert server.get("/health/live").json() == {"status": "live"}


def test_head_of_a_stream_ends(server: httpx.Client, served: Services) -> None:
    """The job waits, so its event stream does not end."""
    post_file(server, "/datasets", dataset_jsonl(), name="rows")
    job = server.post("/jobs", json={"dataset": "rows"}).json()["id"]
    head = server.head(f"/jobs/{job}/events", headers={"Accept": "text/event-stream"})
    assert head.status_code == 200
    assert head.headers["content-type"].startswith("text/event-stream")
    until(lambda: not served.events._followed)


@pytest.mark.parametrize("path", ["/jobs/", "/health/live/", "/docs/", "/openapi.json/", "/datasets/rows/preview/"])
def test_a_trailing_slash_is_served(readonly_client: TestClient, path: str) -> None:
    for method in ("GET", "HEAD"):
        answer = readonly_client.request(method, path, follow_redirects=False)
        assert answer.status_code == 200, path


def test_a_trailing_slash_is_served_with_a_body(client: TestClient, dataset: str) -> None:
    made = client.post("/jobs/", json={"dataset": dataset, "name": "first"}, follow_redirects=False)
    assert made.status_code == 201
    answer = client.post("/jobs/first/cancel/", follow_redirects=False)
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    uploaded = client.post("/datasets/", files={"file": ("rows.jsonl", dataset_jsonl())}, follow_redirects=False)
    assert uploaded.json()["id"] == dataset


def test_every_route_serves_a_trailing_slash(readonly_client: TestClient) -> None:
    for path, operations in readonly_client.get("/openapi.json").json()["paths"].items():
        path = path.replace("{", "").replace("}", "")
        for method in set(operations) & set(METHODS):
            plain = readonly_client.request(method, path)
            slash = readonly_client.request(method, f"{path}/", follow_redirects=False)
            assert slash.status_code == plain.status_code, (method, path)


@pytest.mark.parametrize("path", ["/jobs//", "/nowhere/", "/jobs/x/explode/"])
def test_a_problem_names_the_path_without_its_slash(readonly_client: TestClient, path: str) -> None:
    assert problem(readonly_client.get(path, follow_redirects=False), 404, "no_route")["instance"] == path[:-1]


def test_an_escaped_slash_is_part_of_a_name(readonly_client: TestClient) -> None:
    problem(readonly_client.get("/datasets/rows%2F"), 404, "no_route")
