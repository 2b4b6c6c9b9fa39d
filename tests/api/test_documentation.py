"""The OpenAPI document and Swagger UI are valid and complete, work offline, and have examples that run unchanged."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]  # its stubs are a package of their own
import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from app.cli.client import get, ok
from app.cli.demo_state import DEMO, LATER, LATER_ROWS, SPEC, demo_spec, leave_paused, store_prediction, upload
from app.composition import Services, compose
from app.db.migrating import migrate
from app.domain.base_models import BaseModelDescription
from app.domain.devices import CARDS
from app.domain.plans import Plan
from app.generation import ScriptedGenerator
from app.main import create_app
from app.queue import MemoryDoorbell
from app.settings import Settings
from tests.api.conftest import CPU, lease, listening, make_adapter, make_checkpoint, reads_the_page, walk
from tests.conftest import ROOT, dataset_jsonl

METHODS = ("get", "post", "delete")
Operation = tuple[str, str, dict[str, Any]]


def operations(document: dict[str, Any]) -> list[Operation]:
    return [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method in METHODS
    ]


@pytest.fixture(scope="module")
def document(readonly_deployment: tuple[TestClient, Services]) -> dict[str, Any]:
    found: dict[str, Any] = readonly_deployment[0].get("/openapi.json").json()
    return found


def resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """The schema, with the components that its references point to."""
    return schema | {"components": document["components"]}


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    for name, schema in document["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        for reference in re.findall(r'"\$ref": "([^"]+)"', json.dumps(schema)):
            assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"], name


def test_every_route_is_described(document: dict[str, Any]) -> None:
    known = {tag["name"] for tag in document["tags"]}
    operation_ids = set()
    for method, path, operation in operations(document):
        assert operation["summary"], path
        assert len(operation.get("description", "")) > 10, (method, path)
        assert set(operation["tags"]) <= known, path
        assert re.fullmatch(r"[a-z_]+", operation["operationId"]), path
        operation_ids.add(operation["operationId"])
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), (path, parameter["name"])
    assert len(operation_ids) == len(operations(document))


def test_every_error_is_documented_as_a_problem(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        responses = operation["responses"]
        wanted = {"400", "default"}
        if "requestBody" in operation:
            wanted |= {"413", "415", "422"}
        if operation.get("parameters"):
            wanted.add("422")
        if "{" in path:
            wanted.add("404")
        assert wanted <= set(responses), (method, path)
        for status, response in responses.items():
            if status == "default" or status >= "400":
                assert set(response["content"]) == {"application/problem+json"}, (path, status)
                schema = response["content"]["application/problem+json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ProblemDocument"}
            elif status != "204":
                assert all(content.get("schema") for content in response["content"].values()), (path, status)
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_a_job_is_documented_by_its_spec(document: dict[str, Any]) -> None:
    for path in ("/jobs", "/jobs/plan"):
        body = document["paths"][path]["post"]["requestBody"]
        assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/TrainSpec"}
    spec = document["components"]["schemas"]["TrainSpec"]
    assert spec["required"] == ["dataset"]
    assert {"trainer", "adapter", "quantization", "preprocessing"} <= set(spec["properties"])


def test_json_examples_fit_their_schemas(document: dict[str, Any]) -> None:
    checked = 0
    for _method, path, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if content is None:
            continue
        assert content["examples"], path
        for example in content["examples"].values():
            jsonschema.validate(example["value"], resolved(content["schema"], document))
            checked += 1
    assert checked >= 6


def test_the_example_of_a_plan_is_one(document: dict[str, Any]) -> None:
    answer = document["paths"]["/jobs/plan"]["post"]["responses"]["200"]["content"]["application/json"]
    jsonschema.validate(answer["example"], resolved(answer["schema"], document))
    assert Plan.model_validate(answer["example"]).fits
    asked = document["paths"]["/jobs/plan"]["post"]["parameters"]
    assert set(asked[0]["examples"]) == set(CARDS)


def test_the_key_shows_when_one_is_set(services: Services, document: dict[str, Any]) -> None:
    assert "security" not in document
    settings = services.settings.model_copy(update={"api_key": SecretStr("a key")})
    keyed = create_app(compose(settings)).openapi()
    assert keyed["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}
    assert keyed["security"] == [{"bearer": []}]
    assert keyed["paths"]["/health/live"]["get"]["security"] == []
    assert "401" in keyed["paths"]["/jobs"]["get"]["responses"]
    assert "401" not in keyed["paths"]["/health/live"]["get"]["responses"]


def test_swagger_ui_comes_from_here_alone(readonly_client: TestClient) -> None:
    page = readonly_client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert re.findall(r"https?://[^\s\"'<]+", page.text) == []
    assert "//" not in re.sub(r"(?m)^\s*//.*$", "", page.text).replace("<!--", "")
    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(assets) == 3
    for asset in assets:
        assert asset.startswith("/static/swagger/")
        served = readonly_client.get(asset)
        assert (served.status_code, len(served.content) > 500) == (200, True), asset
    assert '"validatorUrl": null' in page.text
    assert readonly_client.get("/", follow_redirects=False).headers["location"] == "/docs"


# The examples, run.


@pytest.fixture
def demo(tmp_path: Path, tiny_cache: Path) -> Iterator[httpx.Client]:
    """The state that `make demo` creates. The demo's own functions create it, except for the training."""
    settings = Settings(home=tmp_path / "home", cache=tiny_cache)
    migrate(settings.database)
    first = compose(settings, doorbell=MemoryDoorbell())
    described = BaseModelDescription.model_validate_json((tiny_cache / "tiny.json").read_text())
    first.base_models.register(described.model_copy(update={"name": settings.default_base_model}))
    tokens = first.base_models.tokenization(first.base_models.get(None))
    served = compose(settings, doorbell=MemoryDoorbell(), generator=ScriptedGenerator(tokens, reads_the_page))
    served.devices.report("host", CPU)
    train = tmp_path / "train.jsonl"
    train.write_bytes(dataset_jsonl(LATER_ROWS + 6))
    with listening(served) as client:
        upload(client, "/corpora", DEMO, "corpus.jsonl", (ROOT / "examples" / "corpus.jsonl").read_bytes())
        upload(client, "/datasets", DEMO, train.name, train.read_bytes())
        ok(client.post("/jobs", json=SPEC | {"name": DEMO}))
        leave_paused(client, train)
        leased = lease(served)
        make_checkpoint(served, leased, tmp_path / "checkpoint", SPEC["trainer"]["train_steps"])
        (tmp_path / "rows.jsonl").write_text("{}")
        served.artifacts.put(leased, tmp_path / "rows.jsonl")
        make_adapter(served, leased, tmp_path / "adapter", DEMO)
        store_prediction(client, DEMO)
        yield client


def test_every_documented_body_is_accepted_as_it_stands(demo: httpx.Client) -> None:
    for method, path, operation in operations(demo.get("/openapi.json").json()):
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        for name, example in content.get("examples", {}).items():
            answer = tried_out(demo, (method, path, operation), json=example["value"])
            assert answer.is_success, (path, name, answer.text)
            assert "event: error" not in answer.text


def test_the_examples_claims_find_their_pages(demo: httpx.Client) -> None:
    body = demo.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
    for example in body["examples"].values():
        if not example["value"].get("stream"):
            prediction = demo.post("/predict", json=example["value"]).json()
            assert prediction["evidence"], example


def tried_out(client: httpx.Client, one: Operation, **body: Any) -> httpx.Response:
    """Send an operation with the parameters of its documented examples."""
    method, path, operation = one
    query = {}
    for parameter in operation.get("parameters", []):
        for example in list(parameter.get("examples", {}).values())[:1]:
            if parameter["in"] == "path":
                path = path.replace(f"{{{parameter['name']}}}", example["value"])
            else:
                query[parameter["name"]] = example["value"]
    return client.request(method, path, params=query, **body)


def test_every_path_runs_with_its_examples(demo: httpx.Client) -> None:
    """Runs every operation, deletions last. Another test covers the bodies. Uploads are exempt."""
    found = [one for one in operations(demo.get("/openapi.json").json()) if "requestBody" not in one[2]]
    for one in sorted(found, key=lambda one: one[0] == "delete"):
        answer = tried_out(demo, one)
        assert answer.is_success, (*one[:2], answer.text[:300])
    assert len(found) > 25


def test_a_demo_is_repeated_after_its_job_was_deleted(demo: httpx.Client) -> None:
    """The adapter still has the job's name, so the next job gets another name."""
    assert demo.delete(f"/jobs/{DEMO}").status_code == 204
    assert ok(demo.post("/jobs", json=demo_spec(demo)))["name"] != DEMO
    assert demo.delete(f"/adapters/{DEMO}").status_code == 204
    assert ok(demo.post("/jobs", json=demo_spec(demo)))["name"] == DEMO


def test_nothing_that_the_demo_leaves_keeps_the_rest_from_being_deleted(demo: httpx.Client) -> None:
    found = [one for one in operations(demo.get("/openapi.json").json()) if one[0] == "delete"]
    assert [tried_out(demo, one).status_code for one in found] == [204] * 5


def test_the_job_of_the_examples_never_trained_and_waits(demo: httpx.Client) -> None:
    job = get(demo, f"/jobs/{LATER}")
    assert (job["status"], job["attempts"]) == ("paused", 0)


def test_a_second_demo_finds_the_state_of_the_first(demo: httpx.Client, tmp_path: Path) -> None:
    def state() -> list[Any]:
        return [walk(demo, route, 10) for route in ("/jobs", "/datasets", "/corpora", "/predictions")]

    before = state()
    ok(demo.post(f"/jobs/{LATER}/resume"))
    assert leave_paused(demo, tmp_path / "train.jsonl")["status"] == "paused"
    store_prediction(demo, DEMO)
    assert state() == before
    ok(demo.post(f"/jobs/{LATER}/cancel"))
    assert leave_paused(demo, tmp_path / "train.jsonl")["status"] == "cancelled"
