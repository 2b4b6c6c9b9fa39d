"""/datasets: uploads, their reports, and faulty files."""

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.composition import Services
from app.domain.errors import ConflictError
from app.services import datasets as datasets_service
from tests.api.conftest import nothing_left, places, post_file, problem, traces, walk
from tests.conftest import SHARED, dataset_jsonl, needs_shared_data

BROKEN_ROW = b'{"claim": "It is so.", "trajectories": "no step at all"}'
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}


def part(content: str, options: str = 'name="file"; filename="rows.jsonl"') -> bytes:
    return f"--x\r\nContent-Disposition: form-data; {options}\r\n\r\n{content}\r\n".encode()


def test_an_upload_is_answered_with_an_exact_account(client: TestClient) -> None:
    made = post_file(client, "/datasets", dataset_jsonl(6), name="rows")
    assert made.status_code == 201
    dataset = made.json()
    assert (dataset["name"], dataset["filename"], dataset["rows"]) == ("rows", "rows.jsonl", 6)
    report = dataset["report"]
    assert (report["rows_read"], report["rows_kept"], report["rows_refused"]) == (6, 6, 0)
    assert report["labels"] == {"SUPPORTS": 3, "REFUTES": 2, "NOT ENOUGH INFO": 1}
    assert client.get("/datasets/rows").json() == client.get(f"/datasets/{dataset['id']}").json() == dataset


def test_the_same_content_is_the_same_dataset(client: TestClient, served: Services) -> None:
    first = post_file(client, "/datasets", dataset_jsonl(), name="rows")
    with nothing_left(served):
        for fields in ({}, {"name": "rows"}, {"name": "others"}):
            again = post_file(client, "/datasets", dataset_jsonl() + b"\n\n", "other.jsonl", **fields)
            assert again.status_code == 200
            assert again.json() == first.json()


def test_the_same_content_gets_no_name_that_means_another(client: TestClient, served: Services) -> None:
    first = post_file(client, "/datasets", dataset_jsonl(), name="rows").json()
    post_file(client, "/datasets", dataset_jsonl(7), name="others")
    with nothing_left(served):
        refused = problem(post_file(client, "/datasets", dataset_jsonl(), name="others"), 409, "name_taken")
    assert places(refused) == ["name"]
    assert f"'rows' ({first['id']})" in refused["detail"]


def test_columns_may_have_other_names(client: TestClient) -> None:
    rows = dataset_jsonl().replace(b'"claim"', b'"statement"').replace(b'"label"', b'"gold"')
    made = post_file(client, "/datasets", rows, claim_column="statement", label_column="gold")
    assert made.json()["report"]["columns"] == {"claim": "statement", "label": "gold", "trajectories": "trajectories"}


def test_the_hint_of_a_missing_column_is_a_field_that_helps(client: TestClient) -> None:
    rows = dataset_jsonl().replace(b'"trajectories"', b'"trace"').splitlines()
    table = b"claim,trace\n" + b"".join(b'"x","%s"\n' % json.loads(row)["trace"].encode() for row in rows)
    (error,) = problem(post_file(client, "/datasets", table, "rows.csv"), 422, "missing_column")["errors"]
    assert error["hint"] == "did you mean 'trace'? Send trajectories_column=trace"
    field, _, column = error["hint"].rpartition(" ")[2].partition("=")
    assert error["loc"] == [field]
    assert post_file(client, "/datasets", table, "rows.csv", **{field: column}).status_code == 201
    nothing_like = problem(post_file(client, "/datasets", b"claim,b\nx,y\n", "rows.csv"), 422, "missing_column")
    assert "name it in trajectories_column" in nothing_like["detail"]


@needs_shared_data
def test_the_users_own_file(client: TestClient) -> None:
    source = SHARED / "react_fever_270.csv"
    made = post_file(client, "/datasets", source.read_bytes(), source.name)
    assert made.status_code == 201
    assert made.json()["rows"] > 200


def test_a_name_is_made_from_the_files(client: TestClient) -> None:
    names = [
        post_file(client, "/datasets", dataset_jsonl(rows), "my rows (2).jsonl").json()["name"] for rows in (1, 2, 3)
    ]
    assert names == ["my-rows-2", "my-rows-2-2", "my-rows-2-3"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd.jsonl", "passwd.jsonl"),
        ("C:\\Users\\me\\rows.jsonl", "rows.jsonl"),
        ("/", "upload"),
        ("..", ".."),
        ("a" * 1_000 + ".jsonl", "a" * 255),
        ("ro\x07ws\u202e.jsonl", "rows.jsonl"),
    ],
)
def test_a_file_name_is_shown_and_never_followed(
    client: TestClient, served: Services, tmp_path: Path, given: str, shown: str
) -> None:
    content = part(dataset_jsonl(1).decode(), f'name="file"; filename="{given}"') + b"--x--\r\n"
    made = client.post("/datasets", content=content, headers=MULTIPART)
    assert made.status_code == 201, made.text
    assert made.json()["filename"] == shown
    inside = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert {first for first, *_ in inside} == {"home"}


def test_a_preview_pages_through_the_rows(client: TestClient) -> None:
    post_file(client, "/datasets", dataset_jsonl(7), name="rows")
    claims: list[str] = []
    after, more = 0, True
    while more:
        page = client.get("/datasets/rows/preview", params={"after": after, "limit": 3}).json()
        claims += [row["claim"] for row in page["data"]]
        after, more = len(claims), page["has_more"]
    assert claims == [json.loads(line)["claim"] for line in dataset_jsonl(7).splitlines()]
    assert client.get("/datasets/rows/preview?after=7").json() == {"data": [], "has_more": False}


def test_lists_are_paged_newest_first(client: TestClient) -> None:
    made = [post_file(client, "/datasets", dataset_jsonl(rows)).json()["id"] for rows in range(1, 6)]
    assert walk(client, "/datasets", 2) == made[::-1]


def test_delete(client: TestClient, served: Services) -> None:
    with nothing_left(served):
        post_file(client, "/datasets", dataset_jsonl(), name="rows")
        assert client.delete("/datasets/rows").status_code == 204
    problem(client.get("/datasets/rows"), 404, "unknown_dataset")
    problem(client.delete("/datasets/rows"), 404, "unknown_dataset")


def test_a_dataset_in_use_is_kept(client: TestClient, job: str) -> None:
    assert job in problem(client.delete("/datasets/rows"), 409, "dataset_in_use")["detail"]
    client.post(f"/jobs/{job}/cancel")
    assert client.delete("/datasets/rows").status_code == 204
    assert client.get(f"/jobs/{job}").json()["status"] == "cancelled"


@pytest.mark.parametrize("route", ["", "/preview"])
def test_an_unknown_dataset(readonly_client: TestClient, route: str) -> None:
    assert (
        "GET /datasets"
        in problem(readonly_client.get(f"/datasets/ds_nowhere{route}"), 404, "unknown_dataset")["detail"]
    )


# Bad files.


@pytest.mark.parametrize(
    ("content", "filename", "code"),
    [
        (b"", "rows.csv", "empty_file"),
        (b"", "rows.jsonl", "empty_file"),
        (b"a", "rows.csv", "missing_column"),
        (b"{", "rows.jsonl", None),
        (b"\0", "rows", None),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0" * 64, "rows.csv", "unknown_format"),
        (b"claim,trajectories\n\xff\xfe,\xff\n", "rows.csv", "not_utf8"),
        (b'{"claim": "\xff", "trajectories": "\xff"}\n', "rows.jsonl", None),
        (b"id,text\n1,2\n", "rows.csv", "missing_column"),
        (b'{"id": 1}\n', "rows.jsonl", None),
        (b"[" * 100_000, "rows.json", None),
        (b'{"claim": ' + b"[" * 100_000 + b"\n", "rows.jsonl", None),
        (b"PAR1" + b"\xff" * 100 + b"PAR1", "rows.parquet", None),
    ],
    ids=["empty csv", "empty jsonl", "1 byte csv", "1 byte jsonl", "NUL", "png", "csv not utf-8", "jsonl not utf-8",
         "missing columns csv", "missing columns jsonl", "deep json", "deep jsonl", "torn parquet"],
)  # fmt: skip
def test_a_file_without_a_row(readonly_client: TestClient, content: bytes, filename: str, code: str | None) -> None:
    document = problem(post_file(readonly_client, "/datasets", content, filename), 422, code)
    assert places(document)
    assert len(document["errors"]) <= 100


def test_a_single_line_of_50_megabytes(readonly_client: TestClient) -> None:
    response = post_file(readonly_client, "/datasets", b'{"claim": "' + b"a" * (50 << 20), "rows.jsonl")
    document = problem(response, 422, "no_rows_kept")
    assert places(document) == ["line.1"]
    assert len(response.content) < 2_000


def test_10_000_broken_rows_alone(readonly_client: TestClient) -> None:
    response = post_file(readonly_client, "/datasets", b"\n".join([BROKEN_ROW] * 10_000))
    assert "no_steps: 10,000" in problem(response, 422, "no_rows_kept")["detail"]
    assert len(response.content) < 50_000


def test_10_000_broken_rows_beside_good_ones(client: TestClient) -> None:
    made = post_file(client, "/datasets", dataset_jsonl() + b"\n" + b"\n".join([BROKEN_ROW] * 10_000))
    assert made.status_code == 201
    report = made.json()["report"]
    assert (report["rows_read"], report["rows_kept"], report["rows_refused"]) == (10_004, 4, 10_000)
    assert report["codes"] == {"no_steps": 10_000}
    assert len(report["findings"]) + report["findings_left_out"] == 10_000
    assert len(report["findings"]) <= 200
    assert report["findings"][0]["line"] == 5
    assert len(made.content) < 50_000


# Bad forms.


@pytest.mark.parametrize(
    ("body", "status", "place"),
    [
        (b"--x--\r\n", 422, "file"),
        (part("rows", 'name="name"') + b"--x--\r\n", 422, "file"),
        (part("{}", 'name="file"') + b"--x--\r\n", 422, "file"),
        (part("{}") + part("{}") + b"--x--\r\n", 422, "file"),
        (part("{}") + part("a", 'name="name"') + part("b", 'name="name"') + b"--x--\r\n", 422, "name"),
        (part("{}") + part("a", 'name="nam"') + b"--x--\r\n", 422, "nam"),
        (part("{}") + part("a\0b", 'name="name"') + b"--x--\r\n", 422, "name"),
        (part("{}") + part("a\0b", 'name="claim_column"') + b"--x--\r\n", 422, "claim_column"),
        (part("{}") + part("a" * 201, 'name="claim_column"') + b"--x--\r\n", 422, "claim_column"),
        (part("{}") + part("a b", 'name="name"') + b"--x--\r\n", 422, "name"),
        (part("{}", 'name="file"; filename="a\0b"') + b"--x--\r\n", 422, "file"),
        (part("{}", 'name="fi\0le"; filename="a"') + b"--x--\r\n", 422, "fi\0le"),
        (part("{}", 'filename="a"') + b"--x--\r\n", 400, None),
        (b"no form at all", 400, None),
    ],
    ids=["nothing in it", "no file", "a file as text", "two files", "two names", "an unknown field", "NUL in a name",
         "NUL in a column", "a long column", "a bad name", "NUL in a file name", "NUL in a field",
         "a part without a name", "no form"],
)  # fmt: skip
def test_a_bad_form(readonly_client: TestClient, body: bytes, status: int, place: str | None) -> None:
    document = problem(readonly_client.post("/datasets", content=body, headers=MULTIPART), status)
    assert places(document) == ([] if place is None else [place])


@pytest.mark.parametrize("charset", ["utf-7", "utf-16", "rot13", "nonsense"])
def test_a_form_in_a_strange_charset(readonly_client: TestClient, charset: str) -> None:
    headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    body = part("{}", 'name="file"; filename="+2AA-"') + b"--x--\r\n"  # in UTF-7 a lone surrogate
    problem(readonly_client.post("/datasets", content=body, headers=headers), 422)


def test_a_form_without_a_boundary(readonly_client: TestClient) -> None:
    headers = {"Content-Type": "multipart/form-data"}
    assert "boundary" in problem(readonly_client.post("/datasets", content=part("{}"), headers=headers), 400)["detail"]


@pytest.mark.filterwarnings("ignore:Exception ignored in.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning")
def test_a_form_that_stops_in_its_file(readonly_client: TestClient) -> None:
    """The parser does not close the truncated file, which is why the ResourceWarning is filtered."""
    problem(readonly_client.post("/datasets", content=part("{}" * 100), headers=MULTIPART), 422)


def test_a_form_of_too_many_fields(readonly_client: TestClient) -> None:
    body = b"".join(part("a", f'name="f{number}"') for number in range(1_001)) + b"--x--\r\n"
    problem(readonly_client.post("/datasets", content=body, headers=MULTIPART), 400)


def test_a_name_that_is_taken(client: TestClient, served: Services, dataset: str) -> None:
    with nothing_left(served):
        problem(post_file(client, "/datasets", dataset_jsonl(2), name="rows"), 409, "name_taken")


def test_a_name_that_is_taken_meanwhile(
    client: TestClient, served: Services, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two uploads found the name free. The other one stored first, so the database refuses this one."""
    monkeypatch.setattr(datasets_service, "_choose_name", lambda *_: "rows")
    before = traces(served)
    problem(post_file(client, "/datasets", dataset_jsonl(2)), 409, "name_taken")
    after = traces(served)
    assert after["datasets"] == before["datasets"]
    assert after["work"] == before["work"]


def test_an_upload_over_the_limit(client: TestClient, served: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(served.settings.__dict__, "max_upload_bytes", 1_000)
    with nothing_left(served):
        problem(post_file(client, "/datasets", b"a" * 2_000), 413, "too_large")


def test_a_file_that_ends_its_reader_leaves_nothing(
    readonly_client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(*_: object, **__: object) -> None:
        raise ConflictError("the reader is away", code="reader_died")

    monkeypatch.setattr(datasets_service, "ingest", died)
    problem(post_file(readonly_client, "/datasets", dataset_jsonl()), 409, "reader_died")
