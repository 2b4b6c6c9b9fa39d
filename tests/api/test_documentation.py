"""The OpenAPI document and Swagger UI: valid, complete, offline, and with examples that run as they stand."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # its stubs are a package of their own
import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from app.composition import Services, compose
from app.db.migrating import migrate
from app.domain.base_models import BaseModelDescription
from app.generation import ScriptedGenerator
from app.main import create_app
from app.queue import MemoryDoorbell
from app.settings import Settings
from tests.api.conftest import HOST, lease, make_adapter, post_file, reads_the_page
from tests.conftest import ROOT, dataset_jsonl

METHODS = ("get", "post", "delete")
Operation = tuple[str, str, dict[str, Any]]

NEEDS_ANOTHER_STATE = {
    ("post", "/jobs/{job}/cancel"): 409,
    ("post", "/jobs/{job}/pause"): 409,
    ("post", "/jobs/{job}/resume"): 409,
}
"""The demo's job is finished: what these answer then is the documented conflict."""


def operations(document: dict[str, Any]) -> list[Operation]:
    return [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method in METHODS
    ]


@pytest.fixture(scope="module")
def document(refusing: tuple[TestClient, Services]) -> dict[str, Any]:
    found: dict[str, Any] = refusing[0].get("/openapi.json").json()
    return found


def resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """The schema with the components that its references name."""
    return schema | {"components": document["components"]}


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    for name, schema in document["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        for reference in re.findall(r'"\$ref": "([^"]+)"', json.dumps(schema)):
            assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"], name


def test_every_route_is_described(document: dict[str, Any]) -> None:
    known = {tag["name"] for tag in document["tags"]}
    seen = set()
    for method, path, operation in operations(document):
        assert operation["summary"], path
        assert len(operation.get("description", "")) > 10, (method, path)
        assert set(operation["tags"]) <= known, path
        assert re.fullmatch(r"[a-z_]+", operation["operationId"]), path
        seen.add(operation["operationId"])
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), (path, parameter["name"])
    assert len(seen) == len(operations(document))


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


def test_the_key_shows_when_one_is_set(services: Services, document: dict[str, Any]) -> None:
    assert "security" not in document
    settings = services.settings.model_copy(update={"api_key": SecretStr("a key")})
    keyed = create_app(compose(settings)).openapi()
    assert keyed["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}
    assert keyed["security"] == [{"bearer": []}]
    assert keyed["paths"]["/health/live"]["get"]["security"] == []
    assert "401" in keyed["paths"]["/jobs"]["get"]["responses"]
    assert "401" not in keyed["paths"]["/health/live"]["get"]["responses"]


def test_swagger_ui_comes_from_here_alone(door: TestClient) -> None:
    page = door.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert re.findall(r"https?://[^\s\"'<]+", page.text) == []
    assert "//" not in re.sub(r"(?m)^\s*//.*$", "", page.text).replace("<!--", "")
    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(assets) == 3
    for asset in assets:
        assert asset.startswith("/static/swagger/")
        served = door.get(asset)
        assert (served.status_code, len(served.content) > 500) == (200, True), asset
    assert '"validatorUrl": null' in page.text
    assert door.get("/", follow_redirects=False).headers["location"] == "/docs"


# The examples, run.


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Iterator[TestClient]:
    """The state that `make demo` leaves: dataset, corpus, finished job and promoted adapter, all named `demo`."""
    folder = tmp_path_factory.mktemp("demo")
    settings = Settings(home=folder / "home", cache=tiny_cache)
    migrate(settings.database)
    first = compose(settings, doorbell=MemoryDoorbell())
    described = BaseModelDescription.model_validate_json((tiny_cache / "tiny.json").read_text())
    first.base_models.register(described.model_copy(update={"name": settings.default_base_model}))
    tokens = first.base_models.tokenization(first.base_models.get(None))
    served = compose(settings, doorbell=MemoryDoorbell(), generator=ScriptedGenerator(tokens, reads_the_page))
    with TestClient(create_app(served), base_url=HOST, raise_server_exceptions=False) as client:
        pages = (ROOT / "examples" / "corpus.jsonl").read_bytes()
        assert post_file(client, "/corpora", pages, "corpus.jsonl", name="demo").status_code == 201
        assert post_file(client, "/datasets", dataset_jsonl(), name="demo").status_code == 201
        assert client.post("/jobs", json={"dataset": "demo", "name": "demo"}).status_code == 201
        make_adapter(served, lease(served), folder / "adapter", "demo")
        yield client


def test_every_documented_body_is_accepted_as_it_stands(demo: TestClient) -> None:
    for method, path, operation in operations(demo.get("/openapi.json").json()):
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        for name, example in content.get("examples", {}).items():
            answer = demo.request(method, path, json=example["value"])
            assert answer.is_success, (path, name, answer.text)
            assert "event: error" not in answer.text


def test_the_examples_claims_find_their_pages(demo: TestClient) -> None:
    body = demo.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
    for example in body["examples"].values():
        if not example["value"].get("stream"):
            seen = demo.post("/predict", json=example["value"]).json()
            assert seen["evidence"], example


def test_every_path_runs_with_its_examples(demo: TestClient) -> None:
    """Try it out: path parameters as the documentation fills them in; what deletes goes last."""
    found = operations(demo.get("/openapi.json").json())
    for job in demo.get("/jobs", params={"status": "queued"}).json()["data"]:  # which other examples submitted
        demo.post(f"/jobs/{job['id']}/cancel")
    ran = 0
    for method, path, operation in sorted(found, key=lambda one: one[0] == "delete"):
        if "requestBody" in operation or path in ("/predictions/{prediction}", "/health/ready"):
            continue  # bodies: above, uploads are exempt; no prediction has a name; nobody trains here
        filled, query = path, {}
        for parameter in operation.get("parameters", []):
            for example in list(parameter.get("examples", {}).values())[:1]:
                if parameter["in"] == "path":
                    filled = filled.replace(f"{{{parameter['name']}}}", example["value"])
                else:
                    query[parameter["name"]] = example["value"]
        answer = demo.request(method, filled, params=query)
        expected = NEEDS_ANOTHER_STATE.get((method, path))
        assert answer.status_code == expected if expected else answer.is_success, (method, filled, answer.text[:300])
        ran += 1
    assert ran > 20
