"""/corpora: upload, search, promote and delete."""

import json

import pytest
from starlette.testclient import TestClient

from app.composition import Services
from app.services import corpora as corpora_service
from tests.api.conftest import nothing_left, places, post_file, problem, traces, walk
from tests.conftest import corpus_jsonl

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0" * 64


def page(title: str) -> bytes:
    return json.dumps({"title": title, "text": f"{title} is a river."}).encode() + b"\n"


def test_an_upload_is_answered_with_an_account(client: TestClient) -> None:
    made = post_file(client, "/corpora", corpus_jsonl() + b'\n{"title": 3}', "pages.jsonl", name="pages")
    assert made.status_code == 201
    corpus = made.json()
    assert (corpus["name"], corpus["pages"], corpus["default"]) == ("pages", 2, True)
    assert (corpus["report"]["lines"], corpus["report"]["refused"]) == (3, 1)
    assert corpus["report"]["findings"][0]["line"] == 3
    assert client.get("/corpora/pages").json() == corpus


def test_the_same_pages_are_the_same_corpus(client: TestClient, served: Services, corpus: str) -> None:
    with nothing_left(served):
        for fields in ({}, {"name": "pages"}, {"name": "others"}):
            again = post_file(client, "/corpora", corpus_jsonl(), "again.jsonl", **fields)
            assert (again.status_code, again.json()["id"]) == (200, corpus)


def test_the_first_is_the_default_until_another_is_promoted(client: TestClient, corpus: str) -> None:
    second = post_file(client, "/corpora", page("Nile"), name="nile").json()
    assert not second["default"]
    assert client.post("/corpora/nile/promote").json()["default"]
    assert not client.get(f"/corpora/{corpus}").json()["default"]


def test_search_gives_pages_best_first(client: TestClient, corpus: str) -> None:
    found = client.get("/corpora/pages/search", params={"q": "caspian sea"}).json()["data"]
    assert found[0]["title"] == "Volga"
    assert found[0]["text"] == "It flows into the Caspian Sea."
    assert found == sorted(found, key=lambda hit: -hit["score"])
    assert len(client.get("/corpora/pages/search?q=river&limit=1").json()["data"]) == 1


@pytest.mark.parametrize(
    "words", ['"', "*", "AND", "NEAR(", "a:b", "-", "'; DROP TABLE pages", "𝕏", "😀" * 1_000, "( ) ^"]
)
def test_any_text_is_a_search(client: TestClient, corpus: str, words: str) -> None:
    assert client.get("/corpora/pages/search", params={"q": words}).status_code == 200


def test_lists_are_paged_newest_first(client: TestClient) -> None:
    made = [post_file(client, "/corpora", page(f"River {n}"), f"{n}.jsonl").json()["id"] for n in range(5)]
    assert walk(client, "/corpora", 2) == made[::-1]


def test_delete(client: TestClient, served: Services) -> None:
    with nothing_left(served):
        post_file(client, "/corpora", corpus_jsonl(), name="pages")
        assert client.get("/corpora/pages/search?q=river").status_code == 200
        cached = served.settings.cache_path / "corpora" / f"{served.corpora.get('pages').digest}.sqlite"
        assert cached.is_file()
        assert client.delete("/corpora/pages").status_code == 204
    assert not cached.exists()
    for path in ("/corpora/pages", "/corpora/pages/search?q=river"):
        problem(client.get(path), 404, "unknown_corpus")
    problem(client.delete("/corpora/pages"), 404, "unknown_corpus")
    problem(client.post("/corpora/pages/promote"), 404, "unknown_corpus")


@pytest.mark.parametrize(
    "content",
    [b"", b"a", b"caf\xe9\n", b'{"title": "' + b"a" * (50 << 20), b'{"text": "No title."}\n', b'{"a":' * 100_000,
     b'{"title": "a\\u0000", "text": "b"}', b'{"title": "a\\ud800", "text": "b"}'],
    ids=["empty", "1 byte", "not utf-8", "a 50 MB line", "no title", "deep", "NUL", "surrogate"],
)  # fmt: skip
def test_a_file_without_a_page(readonly_client: TestClient, content: bytes) -> None:
    response = post_file(readonly_client, "/corpora", content, "pages.jsonl")
    assert places(problem(response, 422, "no_page_kept"))
    assert len(response.content) < 2_000


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [(PNG, "unknown_format", "a PNG image"), (b"[" * 100_000, "unknown_format", "a JSON array"),
     (b"\x1f\x8b\x08rest", "unknown_format", "gzip"), (page("Elbe").decode().encode("utf-16"), "not_utf8", "UTF-16")],
)  # fmt: skip
def test_a_file_of_another_format_is_called_by_its_name(
    client: TestClient, served: Services, content: bytes, code: str, says: str
) -> None:
    with nothing_left(served):
        response = post_file(client, "/corpora", content, "pages.jsonl")
    assert says in problem(response, 422, code)["detail"]


def test_10_000_broken_lines(client: TestClient, served: Services) -> None:
    broken = b"\n".join([b'{"title": 3}'] * 10_000)
    with nothing_left(served):
        response = post_file(client, "/corpora", broken)
        assert "bad_type: 10,000" in problem(response, 422, "no_page_kept")["detail"]
        assert len(response.content) < 50_000
    report = post_file(client, "/corpora", corpus_jsonl() + b"\n" + broken).json()["report"]
    assert (report["pages"], report["refused"], report["counts"]) == (2, 10_000, {"bad_type": 10_000})
    assert len(report["findings"]) + report["findings_left_out"] == 10_000
    assert len(report["findings"]) < 500


def test_a_name_that_is_taken_or_bad(client: TestClient, served: Services, corpus: str) -> None:
    with nothing_left(served):
        problem(post_file(client, "/corpora", page("Nile"), name="pages"), 409, "name_taken")
        assert places(problem(post_file(client, "/corpora", page("Nile"), name="../nile"), 422, "bad_name")) == ["name"]


def test_a_name_that_is_taken_meanwhile(
    client: TestClient, served: Services, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora_service, "_choose_name", lambda *_: "pages")
    problem(post_file(client, "/corpora", page("Nile")), 409, "name_taken")
    assert traces(served)["corpora"] == 1


def test_a_form_without_its_file(readonly_client: TestClient) -> None:
    assert places(problem(readonly_client.post("/corpora", files={"name": (None, "pages")}), 422)) == ["file"]


def test_an_upload_over_the_limit(client: TestClient, served: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(served.settings.__dict__, "max_upload_bytes", 1_000)
    with nothing_left(served):
        problem(post_file(client, "/corpora", b"a" * 2_000), 413, "too_large")
