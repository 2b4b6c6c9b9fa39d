"""`veritune corpora add` prints one line about the corpus."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import application
from app.composition import Services
from tests.conftest import corpus_jsonl


def add(services: Services, path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VERITUNE_HOME", str(services.settings.home_path))
    monkeypatch.setenv("VERITUNE_CACHE", str(services.settings.cache_path))
    done = CliRunner().invoke(application, ["corpora", "add", str(path)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    ("broken", "ending"),
    [(b"", "(default)"), (b'\n{"title": 3}\n{"title": 4}', "(default)  2 of 4 lines refused")],
)
def test_it_prints_the_number_of_refused_lines(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bytes, ending: str
) -> None:
    path = tmp_path / "pages.jsonl"
    path.write_bytes(corpus_jsonl() + broken)
    told = add(services, path, monkeypatch)
    assert told == f"pages  2 pages  {services.corpora.get('pages').id}  {ending}\n"
