"""A page of another site, open in the operator's browser, can change nothing in the service."""

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from app.api.cross_site import SAFE_METHODS
from app.composition import Services, compose
from app.main import create_app
from tests.api.conftest import HOST, nothing_left, problem
from tests.conftest import corpus_jsonl

EVIL = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
FOREIGN = [
    EVIL,
    {"Origin": "https://evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://127.0.0.1:3000", "Sec-Fetch-Site": "same-site"},
    {"Origin": "http://127.0.0.1.evil.example"},
    {"Origin": "http://[::1"},
    {"Origin": "file://127.0.0.1"},
    {"Origin": "HTTPS://EVIL.EXAMPLE", "Sec-Fetch-Site": "same-origin"},
]
OWN = [
    {},
    {"Origin": HOST, "Sec-Fetch-Site": "same-origin"},
    {"Origin": f"{HOST}:80"},
    {"Sec-Fetch-Site": "none"},
]


def test_no_writing_route_takes_a_request_from_another_site(readonly_client: TestClient) -> None:
    refused = 0
    for path, operations in readonly_client.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            if method.upper() in SAFE_METHODS:
                continue
            assert "403" in operation["responses"], path
            for headers in FOREIGN:
                answer = readonly_client.request(method, path.replace("{", "").replace("}", ""), headers=headers)
                problem(answer, 403, "foreign_origin")
                refused += 1
    assert refused >= 10 * len(FOREIGN)


def test_an_upload_and_a_promotion_from_another_site_change_nothing(
    client: TestClient, served: Services, corpus: str
) -> None:
    with nothing_left(served):
        file = {"file": ("pages.jsonl", corpus_jsonl())}
        problem(client.post("/corpora", files=file, data={"name": "evil"}, headers=EVIL), 403, "foreign_origin")
        problem(client.post(f"/corpora/{corpus}/promote", headers=EVIL), 403, "foreign_origin")
        problem(client.delete(f"/corpora/{corpus}", headers=EVIL), 403, "foreign_origin")
    assert client.get(f"/corpora/{corpus}").status_code == 200


def test_a_key_makes_no_difference(services: Services) -> None:
    settings = services.settings.model_copy(update={"api_key": SecretStr("a key")})
    with TestClient(create_app(compose(settings)), base_url=HOST) as client:
        key = {"Authorization": "Bearer a key"}
        problem(client.post("/jobs/x/cancel", headers=key | EVIL), 403, "foreign_origin")
        problem(client.post("/jobs/x/cancel", headers=EVIL), 403, "foreign_origin")
        problem(client.post("/jobs/x/cancel", headers=key), 404, "unknown_job")


@pytest.mark.parametrize("headers", OWN)
def test_our_own_page_and_what_is_no_browser_are_served(
    client: TestClient, corpus: str, headers: dict[str, str]
) -> None:
    assert client.post(f"/corpora/{corpus}/promote", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", FOREIGN)
def test_reading_is_not_refused(readonly_client: TestClient, headers: dict[str, str]) -> None:
    """A link from another site to /docs works. The browser's same-origin policy protects what is read."""
    assert readonly_client.get("/jobs", headers=headers).status_code == 200


def test_a_page_of_a_host_that_the_operator_allows_is_ours(services: Services) -> None:
    """A proxy may put its own name for the service into Host."""
    settings = services.settings.model_copy(update={"allowed_hosts": "Tune.example"})
    with TestClient(create_app(compose(settings)), base_url=HOST) as client:
        from_proxy = {"Origin": "https://tune.example", "Sec-Fetch-Site": "same-origin"}
        problem(client.post("/jobs/x/cancel", headers=from_proxy), 404, "unknown_job")
        problem(client.post("/jobs/x/cancel", headers=from_proxy | EVIL), 403, "foreign_origin")
