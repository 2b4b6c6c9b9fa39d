"""Uploads of the same content at once, on both databases: one is stored, and all get it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from app.composition import Services
from app.services.corpora import Corpus
from app.services.datasets import Dataset
from app.storage.blobs import Blob
from tests.conftest import corpus_jsonl

Upload = Callable[[str], tuple[Dataset | Corpus, bool]]
AT_ONCE = 4


@pytest.fixture(params=["dataset", "corpus"])
def uploads(request: pytest.FixtureRequest, services: Services, upload: Path, tmp_path: Path) -> Upload:
    """Uploads the same content under a name."""
    pages = tmp_path / "pages.jsonl"
    pages.write_bytes(corpus_jsonl())
    if request.param == "corpus":
        return lambda name: services.corpora.create(pages, "pages.jsonl", name)
    return lambda name: services.datasets.create(upload, "rows.jsonl", None, name, {})


@pytest.fixture
def together(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them have found that nothing has the content or the name before any goes on."""
    met, store = Barrier(AT_ONCE), services.blobs.put_file

    def wait_and_store(path: Path) -> Blob:
        met.wait(20)
        return store(path)

    monkeypatch.setattr(services.blobs, "put_file", wait_and_store)


@pytest.mark.usefixtures("together")
def test_all_who_upload_the_same_under_one_name_get_the_one_that_was_first(uploads: Upload) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = list(pool.map(uploads, ["one"] * AT_ONCE))
    assert len({row.id for row, _new in made}) == 1
    assert sorted(new for _row, new in made) == [False] * (AT_ONCE - 1) + [True]


@pytest.mark.usefixtures("together")
def test_all_who_upload_the_same_under_names_of_their_own_get_the_one_that_was_first(uploads: Upload) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = list(pool.map(uploads, [f"name-{number}" for number in range(AT_ONCE)]))
    assert len({(row.id, row.name) for row, _new in made}) == 1
