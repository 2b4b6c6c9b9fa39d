"""Query strings: a cursor must be an id of its list, and unknown parameters are refused."""

import pytest
from starlette.testclient import TestClient

from app.domain.identity import PREFIXES
from tests.api.conftest import places, problem

LISTS = ["/jobs", "/datasets", "/corpora", "/adapters", "/predictions"]


@pytest.mark.parametrize("route", LISTS)
@pytest.mark.parametrize(
    "cursor", ["passwd", "rows", "", "eval_01m8ep6b0dvxpbkvs2my", "%ED%A0%80", "a" * 5_000, f"job_{'0' * 20}%0A"]
)
def test_a_cursor_that_is_no_id_of_the_list(readonly_client: TestClient, route: str, cursor: str) -> None:
    document = problem(readonly_client.get(f"{route}?limit=3&after={cursor}"), 422, "invalid_request")
    assert places(document) == ["query.after"]
    assert "is not the id of a" in document["detail"]


@pytest.mark.parametrize("route", LISTS)
def test_a_cursor_of_another_list(readonly_client: TestClient, route: str) -> None:
    """The id of a job is no cursor in a list of datasets."""
    statuses = [readonly_client.get(f"{route}?after={prefix}_01m8ep6b0dvxpbkvs2my").status_code for prefix in PREFIXES]
    assert sorted(statuses) == [200] + [422] * (len(PREFIXES) - 1)


def test_every_route_refuses_a_query_parameter_that_it_does_not_have(readonly_client: TestClient) -> None:
    for path, operations in readonly_client.get("/openapi.json").json()["paths"].items():
        for method in operations:
            answer = readonly_client.request(method, f"{path.replace('{', '').replace('}', '')}?stauts=failed")
            assert "query.stauts" in places(problem(answer, 422, "invalid_request")), (method, path)


def test_an_unknown_query_parameter_gets_a_hint(readonly_client: TestClient) -> None:
    (error,) = problem(readonly_client.get("/jobs?stauts=failed"), 422)["errors"]
    assert error["hint"] == "did you mean 'status'?"
    (error,) = problem(readonly_client.get("/devices?page=2"), 422)["errors"]
    assert error["hint"] == "the route takes no query parameters; leave it out"
