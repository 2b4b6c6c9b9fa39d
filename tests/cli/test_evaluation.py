"""`veritune evaluate`: an evaluation job from the terminal."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from app.cli import application
from app.cli.errors import CommandError
from app.cli.evaluation import evaluate
from app.composition import Services, compose
from app.generation.scripted import ScriptedGenerator
from tests.api.conftest import reads_the_page
from tests.cli.conftest import listening_with_runner
from tests.conftest import corpus_jsonl, dataset_jsonl


@pytest.fixture
def client(services: Services, tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of a service with a dataset, a corpus and a runner."""
    generator = ScriptedGenerator(services.base_models.tokenization(services.base_models.get(None)), reads_the_page)
    served = compose(services.settings, doorbell=services.doorbell, generator=generator)
    for name, content in (("rows.jsonl", dataset_jsonl(6)), ("pages.jsonl", corpus_jsonl())):
        (tmp_path / name).write_bytes(content)
    served.datasets.create(tmp_path / "rows.jsonl", "rows.jsonl", None, "rows", {})
    served.corpora.create(tmp_path / "pages.jsonl", "pages.jsonl", "pages")
    with listening_with_runner(served) as found:
        yield found
    served.close()


def test_it_prints_the_table_and_writes_the_page(
    client: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    evaluate(client, {"dataset": "rows", "corpus": "pages", "name": "check"}, page)
    printed = capsys.readouterr().out
    for words in ("check: 6 claims", "tiny, shuffled pages", "always one label", "0.50", str(page)):
        assert words in printed
    assert page.read_text("utf-8").startswith("<!doctype html>")


def test_what_the_service_refuses_ends_it_in_words(client: httpx.Client, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="there is no dataset 'none'"):
        evaluate(client, {"dataset": "none"}, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_its_options_are_listed() -> None:
    shown = CliRunner().invoke(application, ["evaluate", "--help"], terminal_width=200).output
    assert all(option in shown for option in ("--adapter", "--corpus", "--no-controls", "--max-claims", "--page"))
