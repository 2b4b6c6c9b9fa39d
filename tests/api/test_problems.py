"""What every route refuses: wrong hosts, keys, sizes and content types, and unsafe JSON."""

import gc
import json
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from app.api.errors import status_of
from app.api.guard import _check_json
from app.composition import Services, compose
from app.domain import errors
from app.domain.errors import VerituneError
from app.domain.identity import PREFIXES
from app.main import create_app
from app.queue import MemoryDoorbell
from tests.api.conftest import HOST, RHINE, lease, make_checkpoint, nothing_left, places, post_file, problem
from tests.conftest import corpus_jsonl, dataset_jsonl

KEY = "a key of this test"
JSON = {"Content-Type": "application/json"}
SURROGATE = "\\ud800"  # as JSON escapes it


@pytest.fixture
def keyed(services: Services) -> Iterator[TestClient]:
    """A client of a deployment with an API key."""
    settings = services.settings.model_copy(update={"api_key": SecretStr(KEY)})
    composed = compose(settings, doorbell=MemoryDoorbell())
    with TestClient(create_app(composed), base_url=HOST, raise_server_exceptions=False) as client:
        yield client


def test_an_unknown_route(readonly_client: TestClient) -> None:
    assert "/docs" in problem(readonly_client.get("/model"), 404, "no_route")["detail"]
    problem(readonly_client.post("/jobs/x/explode", json={}), 404, "no_route")


def test_an_unknown_method(readonly_client: TestClient) -> None:
    response = readonly_client.put("/jobs", json={})
    problem(response, 405, "wrong_method")
    assert "GET" in response.headers["allow"]
    problem(readonly_client.request("BREW", "/jobs"), 405, "wrong_method")


def test_a_missing_asset_is_a_problem_and_no_page(readonly_client: TestClient) -> None:
    problem(readonly_client.get("/static/swagger/../../settings.py"), 404, "no_route")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "[fe80::1]", "[::1", "localhost:80:90", ""])
def test_a_host_that_is_not_served(readonly_client: TestClient, host: str) -> None:
    assert (
        "VERITUNE_ALLOWED_HOSTS"
        in problem(readonly_client.get("/jobs", headers={"Host": host}), 400, "wrong_host")["detail"]
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]", "[::1]:8000"])
def test_loopback_is_served_by_all_its_names(readonly_client: TestClient, host: str) -> None:
    assert readonly_client.get("/jobs", headers={"Host": host}).status_code == 200


def test_a_host_that_the_operator_allows(services: Services) -> None:
    settings = services.settings.model_copy(update={"allowed_hosts": "tune.example, other.example"})
    with TestClient(create_app(compose(settings)), base_url="http://Tune.example:81") as client:
        assert client.get("/jobs").status_code == 200
        problem(client.get("/jobs", headers={"Host": "third.example"}), 400, "wrong_host")


@pytest.mark.parametrize(
    "given", [None, "", KEY, "Bearer", "Bearer ", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x"]
)
def test_a_missing_or_wrong_key(keyed: TestClient, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    response = keyed.get("/jobs", headers=headers)
    problem(response, 401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


def test_a_key_that_is_no_ascii_is_wrong(keyed: TestClient) -> None:
    problem(keyed.get("/jobs", headers={b"Authorization": "Bearer é".encode("latin-1")}), 401, "unauthorized")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_the_right_key(keyed: TestClient, scheme: str) -> None:
    assert keyed.get("/jobs", headers={"Authorization": f"{scheme} {KEY}"}).status_code == 200


def test_every_route_but_probes_and_documentation_asks_for_the_key(keyed: TestClient) -> None:
    document = keyed.get("/openapi.json").json()
    assert {path for path in document["paths"] if path.startswith("/health")} == {"/health/live", "/health/ready"}
    for path, operations in document["paths"].items():
        for method in operations:
            asked = keyed.request(method, path.replace("{", "").replace("}", ""))
            assert (asked.status_code == 401) != path.startswith("/health"), path
    problem(keyed.get("/nowhere"), 401, "unauthorized")


def test_the_key_is_compared_in_constant_time(keyed: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def watched(given: bytes, wanted: bytes) -> bool:
        compared.append((given, wanted))
        return given == wanted

    monkeypatch.setattr("app.api.guard.hmac.compare_digest", watched)
    keyed.get("/jobs", headers={"Authorization": "Basic guess"})
    assert compared == [(b"guess", KEY.encode())]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("route", ["/jobs", "/jobs/plan", "/predict", "/predict/batch"])
def test_a_json_route_reads_json_alone(readonly_client: TestClient, route: str, kind: str) -> None:
    response = readonly_client.post(route, content=b'{"dataset": "rows"}', headers={"Content-Type": kind})
    assert "application/json" in problem(response, 415, "unsupported_media_type")["detail"]


@pytest.mark.parametrize("route", ["/datasets", "/corpora"])
def test_an_upload_route_reads_forms_alone(readonly_client: TestClient, route: str) -> None:
    for kind in ("application/json", "text/csv", "application/x-www-form-urlencoded"):
        response = readonly_client.post(route, content=b"{}", headers={"Content-Type": kind})
        assert "multipart/form-data" in problem(response, 415, "unsupported_media_type")["detail"]


def test_a_body_without_a_type(readonly_client: TestClient) -> None:
    problem(readonly_client.post("/jobs", content=b'{"dataset": "rows"}'), 415, "unsupported_media_type")


@pytest.mark.parametrize("body", [b"", b"{", b'{"dataset": }', b"\xef\xbb\xbf{}", b"{'dataset': 'rows'}", b"nul"])
def test_a_body_that_is_no_json(readonly_client: TestClient, body: bytes) -> None:
    problem(readonly_client.post("/jobs", content=body, headers=JSON), 422)


@pytest.mark.parametrize("body", [b'{"dataset": "\xff"}', "{}".encode("utf-16"), b'{"dataset": "\xed\xa0\x80"}'])
def test_a_body_that_is_not_utf8(readonly_client: TestClient, body: bytes) -> None:
    problem(readonly_client.post("/jobs", content=body, headers=JSON), 422, "bad_utf8")


@pytest.mark.parametrize("body", [b"[]", b'"rows"', b"3", b"null", b"true"])
@pytest.mark.parametrize("route", ["/jobs", "/predict", "/predict/batch"])
def test_json_that_is_no_object(readonly_client: TestClient, route: str, body: bytes) -> None:
    problem(readonly_client.post(route, content=body, headers=JSON), 422)


@pytest.mark.parametrize("route", ["/jobs", "/predict", "/jobs/plan"])
def test_json_nested_100_000_deep(readonly_client: TestClient, route: str) -> None:
    for opened, closed in ((b"[", b"]"), (b'{"a":', b"}")):
        body = opened * 100_000 + b"1" + closed * 100_000
        assert "64" in problem(readonly_client.post(route, content=body, headers=JSON), 422, "too_deep")["detail"]
    problem(readonly_client.post(route, content=b"[" * 100_000, headers=JSON), 422)


def test_depth_is_counted_in_structure_and_not_in_text(client: TestClient, dataset: str) -> None:
    def nested(levels: int) -> object:
        return json.loads("[" * levels + "]" * levels)

    def submit(inner: object) -> int:
        spec = {"dataset": dataset, "metadata": {"a": inner}}
        return client.post("/jobs", json=spec).status_code

    assert submit("[" * 500 + '\\"{') == 201
    assert submit(nested(62)) == 201
    problem(client.post("/jobs", json={"dataset": dataset, "metadata": {"a": nested(63)}}), 422, "too_deep")


@pytest.mark.parametrize("route", ["/jobs", "/jobs/plan", "/predict", "/predict/batch"])
def test_a_repeated_key_is_refused_with_its_path(readonly_client: TestClient, route: str) -> None:
    body = '{"trainer": {"train_steps": 2}, "trainer": {"epochs": 1}}'
    refused = problem(readonly_client.post(route, content=body, headers=JSON), 422, "repeated_key")
    assert places(refused) == ["trainer"]
    nested = '{"requests": [{"claim": "One.", "claim": "Two."}]}'
    refused = problem(readonly_client.post(route, content=nested, headers=JSON), 422, "repeated_key")
    assert refused["errors"][0]["loc"] == ["requests", 0, "claim"]
    assert "the key 'claim' is repeated" in refused["detail"]


def test_a_mebibyte_of_json_is_checked_about_as_fast_as_it_is_parsed() -> None:
    body = json.dumps([{"a": 1, "b": [1, 2]}] * ((1 << 20) // 24)).encode()

    def fastest(work: Callable[[bytes], object]) -> float:
        gc.collect()
        return min(timeit.repeat(lambda: work(body), number=1, repeat=5, timer=time.thread_time))

    assert fastest(_check_json) < 4 * fastest(json.loads)


@pytest.mark.parametrize("escape", ["\\u0000", SURROGATE, "\\uDFFF"])
def test_a_forbidden_character_in_json(readonly_client: TestClient, escape: str) -> None:
    bodies = {
        "dataset": f'{{"dataset": "ro{escape}ws"}}',
        "metadata.note": f'{{"dataset": "rows", "metadata": {{"note": "a{escape}"}}}}',
        "metadata": f'{{"dataset": "rows", "metadata": {{"a{escape}": 1}}}}',
    }
    for place, body in bodies.items():
        response = readonly_client.post("/jobs", content=body.encode(), headers=JSON)
        assert places(problem(response, 422, "forbidden_character")) == [place]
    claim = f'{{"claim": "The Rhine{escape} is long."}}'
    problem(readonly_client.post("/predict", content=claim.encode(), headers=JSON), 422, "forbidden_character")


def test_a_pair_of_surrogates_is_a_character(client: TestClient, dataset: str) -> None:
    body = f'{{"dataset": "{dataset}", "metadata": {{"note": "\\ud83d\\ude00"}}}}'
    made = client.post("/jobs", content=body.encode(), headers=JSON)
    assert made.json()["spec"]["metadata"] == {"note": "😀"}


@pytest.mark.parametrize(
    "path",
    [
        "/datasets/a%00b",
        "/corpora/%00",
        "/corpora/pages/search?q=%00",
        "/jobs/a%00/events",
        "/jobs?after=%00",
        "/adapters/%00/download",
        "/predictions/%00",
        "/nowhere%00",
    ],
)
def test_a_nul_in_path_or_query(readonly_client: TestClient, path: str) -> None:
    problem(readonly_client.get(path), 422, "forbidden_character")


@pytest.mark.parametrize(
    "path", ["/datasets/%ED%A0%80", "/corpora/%ED%A0%80/search?q=a", "/jobs/%FF", "/adapters/%ED%A0%80"]
)
def test_a_surrogate_in_a_path(readonly_client: TestClient, path: str) -> None:
    problem(readonly_client.get(path), 404)


def test_a_surrogate_in_a_query(client: TestClient, corpus: str) -> None:
    assert client.get("/corpora/pages/search?q=%ED%A0%80").status_code == 200
    assert places(problem(client.get("/jobs?after=%ED%A0%80"), 422)) == ["query.after"]


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/jobs?limit=0", "query.limit"),
        ("/jobs?limit=-1", "query.limit"),
        ("/jobs?limit=101", "query.limit"),
        ("/jobs?limit=ten", "query.limit"),
        ("/jobs?limit=", "query.limit"),
        ("/jobs?limit=1e3", "query.limit"),
        (f"/jobs?limit={'9' * 5_000}", "query.limit"),
        ("/jobs?status=done", "query.status"),
        ("/jobs?stauts=failed", "query.stauts"),
        ("/jobs?limit=1&limit=2", "query.limit"),
        ("/jobs?=1", "query."),
        ("/jobs?AFTER=1", "query.AFTER"),
        ("/jobs/x?fields=id", "query.fields"),
        ("/devices?limit=1", "query.limit"),
        ("/health/live?verbose=1", "query.verbose"),
        ("/metrics?name=a", "query.name"),
        ("/datasets?limit=0", "query.limit"),
        ("/corpora?limit=0", "query.limit"),
        ("/adapters?limit=0", "query.limit"),
        ("/predictions?limit=0", "query.limit"),
        ("/datasets/x/preview?limit=0", "query.limit"),
        (f"/datasets/x/preview?after={2**31}", "query.after"),
        ("/jobs/x/events?limit=1001", "query.limit"),
        (f"/jobs/x/events?after={10**30}", "query.after"),
        ("/jobs/x/metrics?after=-1", "query.after"),
        ("/corpora/x/search", "query.q"),
        ("/corpora/x/search?q=", "query.q"),
        (f"/corpora/x/search?q={'a' * 1_001}", "query.q"),
        (f"/jobs/{'a' * 201}", "path.job"),
        (f"/datasets/{'a' * 201}", "path.dataset"),
    ],
)
def test_a_bad_page_limit_and_its_kin(readonly_client: TestClient, path: str, place: str) -> None:
    assert places(problem(readonly_client.get(path), 422, "invalid_request")) == [place]


def test_huge_numbers_in_json(readonly_client: TestClient) -> None:
    for number, code in (("9" * 5_000, "bad_json"), ("9" * 4_000, "invalid_spec"), ("1e999", "invalid_spec")):
        body = f'{{"dataset": "rows", "trainer": {{"epochs": {number}}}}}'
        problem(readonly_client.post("/jobs", content=body.encode(), headers=JSON), 422, code)
    body = f'{{"dataset": "rows", "seed": {10**40}}}'
    assert places(problem(readonly_client.post("/jobs", content=body.encode(), headers=JSON), 422)) == ["seed"]


def test_a_json_body_over_the_limit(readonly_client: TestClient) -> None:
    claim = "a" * (1 << 20)
    for route in ("/predict", "/jobs", "/jobs/x/cancel"):
        problem(readonly_client.post(route, json={"claim": claim}), 413, "too_large")


def test_values_in_problems_are_truncated(readonly_client: TestClient) -> None:
    response = readonly_client.post("/jobs", json={"dataset": "rows", "k" * 100_000: 1, "name": "n" * 100_000})
    problem(response, 422, "invalid_spec")
    assert len(response.content) < 10_000


def test_a_hundred_thousand_unknown_keys_are_answered_fast(readonly_client: TestClient) -> None:
    document = {f"k{number}": 1 for number in range(80_000)}
    started = time.process_time()
    response = readonly_client.post("/jobs", json={"dataset": "rows"} | document)
    assert len(problem(response, 422, "invalid_spec")["errors"]) == 100
    assert time.process_time() - started < 5


def test_an_internal_error_reveals_nothing(
    client: TestClient, served: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(type(served.jobs), "get_jobs", broken)
    response = client.get("/jobs/x")
    problem(response, 500, "internal_error")
    assert "secret" not in response.text


def test_every_error_of_the_tree_has_a_status() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VerituneError)]
    statuses = {kind.__name__: status_of(kind("x")) for kind in kinds}
    assert statuses == {
        "VerituneError": 500,
        "InvalidError": 422,
        "NotYetSupportedError": 422,
        "TooLargeError": 413,
        "NotFoundError": 404,
        "ConflictError": 409,
        "BusyError": 429,
        "UnavailableError": 503,
        "ClientDisconnectedError": 400,
        "LeaseLostError": 500,
        "StorageError": 503,
    }


@pytest.mark.parametrize("name", [f"{prefix}_01m8ep6b0dvxpbkvs2my" for prefix in PREFIXES])
def test_no_name_is_spelled_like_an_id(
    client: TestClient, served: Services, job: str, name: str, tmp_path: Path
) -> None:
    """A reference would find the resource with that id instead of the one with that name."""
    make_checkpoint(served, lease(served), tmp_path / "1", 1)
    one = {"claim": RHINE, "mode": "ungrounded", "store": True, "name": name}
    with nothing_left(served):
        for refused in (
            post_file(client, "/datasets", dataset_jsonl(2), name=name),
            post_file(client, "/corpora", corpus_jsonl(), "pages.jsonl", name=name),
            client.post("/jobs", json={"dataset": "rows", "name": name}),
            client.post(f"/jobs/{job}/checkpoints/1/publish", json={"name": name}),
            client.post("/predict", json=one),
            client.post("/predict", json=one | {"stream": True}),
        ):
            assert places(problem(refused, 422, "bad_name")) == ["name"]
    made = post_file(client, "/datasets", dataset_jsonl(2), f"{name}.jsonl").json()
    assert made["name"] == f"{name}-2"
