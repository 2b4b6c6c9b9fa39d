"""Concurrent uploads of the same content, on both databases: one is stored, and all get it."""

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
def concurrent_uploads(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """All uploads check for the content and the name before any of them stores it."""
    met, store = Barrier(AT_ONCE), services.blobs.put_file

    def wait_and_store(path: Path) -> Blob:
        met.wait(20)
        return store(path)

    monkeypatch.setattr(services.blobs, "put_file", wait_and_store)


@pytest.mark.usefixtures("concurrent_uploads")
def test_concurrent_uploads_of_one_content_and_name_get_the_first_dataset(uploads: Upload) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = list(pool.map(uploads, ["one"] * AT_ONCE))
    assert len({row.id for row, _new in made}) == 1
    assert sorted(new for _row, new in made) == [False] * (AT_ONCE - 1) + [True]


@pytest.mark.usefixtures("concurrent_uploads")
def test_concurrent_uploads_of_one_content_under_different_names_get_the_first_dataset(uploads: Upload) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = list(pool.map(uploads, [f"name-{number}" for number in range(AT_ONCE)]))
    assert len({(row.id, row.name) for row, _new in made}) == 1
