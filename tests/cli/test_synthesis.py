"""`veritune synthesize` and `veritune reground`: datasets made from the terminal."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.cli.errors import CommandError
from app.cli.synthesis import run
from app.composition import Services
from tests.cli.conftest import listening_with_runner
from tests.conftest import corpus_jsonl, dataset_jsonl

CLAIMS = [
    {"claim": "The Volga is a broad river.", "label": "SUPPORTS", "page": "Volga"},
    {"claim": "The Oder is a broad river.", "label": "SUPPORTS", "page": "Oder"},
]


@pytest.fixture
def client(services: Services, tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of a service with datasets, a corpus and a runner."""
    (tmp_path / "claims.jsonl").write_text("\n".join(map(json.dumps, CLAIMS)))
    (tmp_path / "lost.jsonl").write_text(json.dumps(CLAIMS[1]))
    (tmp_path / "rows.jsonl").write_bytes(dataset_jsonl())
    (tmp_path / "pages.jsonl").write_bytes(corpus_jsonl())
    for name in ("claims", "lost"):
        services.datasets.create(tmp_path / f"{name}.jsonl", f"{name}.jsonl", None, name, {}, "claims")
    services.datasets.create(tmp_path / "rows.jsonl", "rows.jsonl", None, "rows", {})
    services.corpora.create(tmp_path / "pages.jsonl", "pages.jsonl", "pages")
    with listening_with_runner(services) as found:
        yield found


def test_it_prints_what_was_made_and_what_was_left_out(
    client: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "synthesis.json"
    run(client, "/datasets/synthesize", {"dataset": "claims", "output": "made"}, report)
    printed = capsys.readouterr().out
    for words in (
        "1 of 2 rows made",
        "1 SUPPORTS",
        "Searches opened a page",
        "the corpus has no such page",
        str(report),
    ):
        assert words in printed
    assert json.loads(report.read_text())["refused"] == {"page_missing": 1}
    run(client, "/datasets/rows/reground", {"output": "new"}, report)
    assert "4 of 4 rows made" in capsys.readouterr().out


def test_a_job_that_made_nothing_leaves_its_report(client: httpx.Client, tmp_path: Path) -> None:
    report = tmp_path / "synthesis.json"
    with pytest.raises(CommandError, match="no trajectory could be made"):
        run(client, "/datasets/synthesize", {"dataset": "lost"}, report)
    assert json.loads(report.read_text())["refusals"][0]["row"] == 1
