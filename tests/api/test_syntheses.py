"""/datasets/synthesize and /datasets/{dataset}/reground: jobs that make datasets."""

import json

import pytest
from starlette.testclient import TestClient

from tests.api.conftest import places, post_file, problem
from tests.conftest import corpus_jsonl, dataset_jsonl

CLAIMS = b'{"claim": "The Volga is a broad river.", "label": "SUPPORTS", "page": "Volga"}'


@pytest.fixture(autouse=True)
def stored(client: TestClient) -> None:
    assert post_file(client, "/datasets", CLAIMS, name="claims", kind="claims").status_code == 201
    assert post_file(client, "/datasets", dataset_jsonl(), name="rows").status_code == 201
    assert post_file(client, "/corpora", corpus_jsonl(), name="pages").status_code == 201


@pytest.mark.parametrize(
    ("route", "body", "kind"),
    [
        ("/datasets/synthesize", {"dataset": "claims", "corpus": "pages"}, "synthesize"),
        ("/datasets/rows/reground", {"corpus": "pages"}, "reground"),
        ("/datasets/rows/reground", {}, "reground"),
    ],
)
def test_the_answer_is_a_queued_job(client: TestClient, route: str, body: dict[str, str], kind: str) -> None:
    made = client.post(route, json=body, headers={"Idempotency-Key": "once"})
    assert made.status_code == 201
    job = made.json()
    assert (job["kind"], job["status"], job["plan"]["kind"]) == (kind, "queued", kind)
    assert made.headers["Location"] == f"/jobs/{job['id']}"
    assert client.get(f"/jobs/{job['id']}").json() == job
    again = client.post(route, json=body, headers={"Idempotency-Key": "once"})
    assert (again.status_code, again.json()) == (201, job)


@pytest.mark.parametrize(
    ("route", "body", "status", "code", "place"),
    [
        ("/datasets/synthesize", {"dataset": "none"}, 404, "unknown_dataset", None),
        ("/datasets/synthesize", {"dataset": "claims", "corpus": "none"}, 404, "unknown_corpus", None),
        ("/datasets/synthesize", {"dataset": "claims", "output": "rows"}, 409, "name_taken", "output"),
        ("/datasets/synthesize", {"dataset": "claims", "split": [1, 1, 0]}, 422, "invalid_request", None),
        ("/datasets/synthesize", {"dataset": "claims", "pages": 3}, 422, "invalid_request", None),
        ("/datasets/none/reground", {}, 404, "unknown_dataset", None),
        ("/datasets/~x/reground", {}, 404, "unknown_dataset", None),
        ("/datasets/a%20%20b/reground", {}, 404, "unknown_dataset", None),
        ("/datasets/claims/reground", {}, 422, "nothing_to_replay", "dataset"),
        ("/datasets/rows/reground", {"dataset": "claims"}, 422, "invalid_request", None),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(
    client: TestClient, route: str, body: dict[str, object], status: int, code: str, place: str | None
) -> None:
    refused = problem(client.post(route, json=body), status, code)
    if place is not None:
        assert places(refused) == [place]


def test_an_unknown_kind_of_rows_is_refused(client: TestClient) -> None:
    refused = post_file(client, "/datasets", json.dumps({"claim": "A."}).encode(), kind="claim")
    assert places(problem(refused, 422)) == ["kind"]
