"""The corpus file as a file: read-only, whatever its path, and honest about what it cannot read."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from app.knowledge.base import CorpusUnreadable
from app.knowledge.building import build_corpus
from app.knowledge.corpus import CorpusFile

PAGE = b'{"title": "Marlow Bridge", "text": "It is a bridge."}'


def test_a_path_may_hold_what_a_uri_may_not(tmp_path: Path) -> None:
    path = tmp_path / "a b?mode=rwc#ü%41.corpus"
    build_corpus([PAGE], path)
    corpus = CorpusFile(path, "corp_1")
    assert corpus.search("Marlow Bridge").page is not None
    corpus.close()


def test_searching_writes_nothing_beside_or_into_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.corpus"
    build_corpus([PAGE], path)
    path.chmod(0o444)
    before = path.read_bytes()
    corpus = CorpusFile(path, "corp_1")
    corpus.search("a bridge")
    corpus.find("bridge")
    corpus.close()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.corpus"]


def test_a_digest_that_is_known_is_not_computed_again(tmp_path: Path) -> None:
    build_corpus([PAGE], tmp_path / "c.corpus")
    corpus = CorpusFile(tmp_path / "c.corpus", "corp_1", snapshot="known")
    assert corpus.snapshot == "known"
    corpus.close()


class TestWhatCannotBeRead:
    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(CorpusUnreadable, match=r"gone\.corpus"):
            CorpusFile(tmp_path / "gone.corpus", None)

    def test_a_file_that_is_no_database(self, tmp_path: Path) -> None:
        (tmp_path / "c.corpus").write_bytes(PAGE * 100)
        with pytest.raises(CorpusUnreadable, match="cannot be read"):
            CorpusFile(tmp_path / "c.corpus", None)

    def test_another_kind_of_database(self, tmp_path: Path) -> None:
        with closing(sqlite3.connect(tmp_path / "c.corpus")) as connection:
            connection.execute("CREATE TABLE pages (id)")
        with pytest.raises(CorpusUnreadable, match="not a Veritune corpus"):
            CorpusFile(tmp_path / "c.corpus", None)

    def test_a_corpus_of_another_format(self, tmp_path: Path) -> None:
        build_corpus([PAGE], tmp_path / "c.corpus")
        with closing(sqlite3.connect(tmp_path / "c.corpus")) as connection:
            connection.execute("PRAGMA user_version = 99")
        with pytest.raises(CorpusUnreadable, match="format 99"):
            CorpusFile(tmp_path / "c.corpus", None)
