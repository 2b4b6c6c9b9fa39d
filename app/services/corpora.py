"""Corpora: sets of pages. Each is one immutable file, which every host that searches it copies by its digest."""

import tempfile
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from sqlalchemy.exc import IntegrityError

from app.db import Database, Unit
from app.db.tables import CorpusRow
from app.domain.corpora import CorpusReport
from app.domain.errors import ConflictError, InvalidError, NotFoundError, Problem
from app.domain.frozen import Frozen
from app.domain.identity import new_id
from app.ingest.corpus_lines import corpus_lines
from app.knowledge import (
    DEFAULT_LIMITS,
    CorpusFile,
    CorpusRefused,
    CorpusUnreadable,
    Hit,
    KnowledgeSource,
    build_corpus,
)
from app.services.naming import check_name, choose_name, shown_filename, taken_by_another
from app.services.staged_blobs import staged
from app.storage import Blobs, sweep
from app.storage.blobs import hash_file

RESOURCE = "corpus"
DEFAULT = "default"
OPEN_AT_ONCE = 16
SUGGESTED = 5
"""Names of corpora in the error for a request that names none."""


class Corpus(Frozen):
    """A corpus as the API shows it. `digest` is the snapshot that Observations name."""

    id: str
    object: Literal["corpus"] = "corpus"
    name: str
    digest: str
    pages: int
    bytes: int
    default: bool
    report: CorpusReport
    created_at: datetime


class Corpora:
    """Creates, lists and opens corpora. The first one is the default, which predictions search if they name none."""

    def __init__(self, database: Database, blobs: Blobs, cache: Path) -> None:
        self._database = database
        self._blobs = blobs
        self._directory = cache / "corpora"
        self._open_files: OrderedDict[str, CorpusFile] = OrderedDict()
        self._lock = Lock()

    def sweep(self) -> None:
        """Delete partial files whose process was killed."""
        sweep(self._directory, ".build-*", ".*.sqlite.*")

    def create(self, upload: Path, filename: str, name: str | None) -> tuple[Corpus, bool]:
        """(the corpus, whether it is new). The same pages give the same corpus, under its first name."""
        check_name(name)
        filename = shown_filename(filename)
        self._directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._directory, prefix=".build-") as directory:
            built = Path(directory) / "corpus.sqlite"
            report = _build(upload, built)
            digest, size = hash_file(built)
            with self._database.read() as unit:
                if same := self._find_existing(unit, digest, name):
                    return same, False
                _choose_name(unit, name, filename, digest)  # refuse before the pages are stored
            with staged(self._database, self._blobs) as blobs:
                blobs.put_file(built)
                return self._add(report, digest, size, filename, name)

    def _add(
        self, report: CorpusReport, digest: str, size: int, filename: str, name: str | None
    ) -> tuple[Corpus, bool]:
        try:
            with self._database.write() as unit:
                if same := self._find_existing(unit, digest, name):
                    return same, False
                row = CorpusRow(
                    id=new_id("corp"),
                    name=_choose_name(unit, name, filename, digest),
                    digest=digest,
                    bytes=size,
                    pages=report.pages,
                    report=report.model_dump(mode="json"),
                    created_at=datetime.now(UTC),
                )
                unit.corpora.add(row)
                if unit.aliases.find_target(RESOURCE, DEFAULT) is None:
                    unit.aliases.point(RESOURCE, DEFAULT, row.id)
        except IntegrityError:  # another upload committed the same pages or the same name
            with self._database.read() as unit:
                same = self._find_existing(unit, digest, name)
            if same is None:
                raise ConflictError("that name was taken meanwhile; try again", code="name_taken") from None
            return same, False
        return self.get(row.id), True

    def _find_existing(self, unit: Unit, digest: str, name: str | None) -> Corpus | None:
        """The corpus with these pages, if any. Raises ConflictError if `name` belongs to another corpus."""
        known = unit.corpora.by_digest(digest)
        if known is None:
            return None
        if name not in (None, known.name) and unit.corpora.find(name) is not None:
            raise taken_by_another(name, known.name, known.id, "corpus")
        return self._to_corpus(unit, known)

    def get(self, reference: str) -> Corpus:
        with self._database.read() as unit:
            return self._to_corpus(unit, _get_row(unit, reference))

    def list_corpora(self, after: str | None, limit: int) -> tuple[list[Corpus], bool]:
        with self._database.read() as unit:
            rows, more = unit.corpora.list_corpora(after, limit)
            return [self._to_corpus(unit, row) for row in rows], more

    def promote(self, reference: str) -> Corpus:
        """Make this the default corpus, which predictions search if they name none."""
        with self._database.write() as unit:
            unit.aliases.point(RESOURCE, DEFAULT, _get_row(unit, reference).id)
        return self.get(reference)

    def delete(self, reference: str) -> None:
        with self._database.write() as unit:
            row = _get_row(unit, reference)
            unit.aliases.drop(RESOURCE, row.id)
            unit.corpora.remove(row)
        with self._lock:
            self._open_files.pop(row.digest, None)
        (self._directory / f"{row.digest}.sqlite").unlink(missing_ok=True)
        self._blobs.discard((row.digest,))

    def find(self, reference: str, query: str, limit: int) -> tuple[Hit, ...]:
        """Search pages by free text, best first."""
        return self.open(reference)[1].find(query, limit)

    def resolve(self, reference: str | None) -> Corpus:
        """The named corpus, or the default one. Reads no pages."""
        with self._database.read() as unit:
            return self._to_corpus(unit, _resolve_row(unit, reference))

    def open(self, reference: str | None) -> tuple[str, KnowledgeSource]:
        """(id, source) of a corpus, or of the default one if none is named."""
        with self._database.read() as unit:
            row = _resolve_row(unit, reference)
        return row.id, self._open_file(row)

    def _open_file(self, row: CorpusRow) -> CorpusFile:
        with self._lock:
            if known := self._open_files.get(row.digest):
                self._open_files.move_to_end(row.digest)
                return known
            path = self._blobs.fetch(row.digest, self._directory / f"{row.digest}.sqlite")
            opened = CorpusFile(path, row.id, row.digest)
            self._open_files[row.digest] = opened
            if len(self._open_files) > OPEN_AT_ONCE:
                self._open_files.popitem(last=False)
            return opened

    def _to_corpus(self, unit: Unit, row: CorpusRow) -> Corpus:
        document: dict[str, Any] = {
            "id": row.id,
            "name": row.name,
            "digest": row.digest,
            "pages": row.pages,
            "bytes": row.bytes,
            "default": unit.aliases.find_target(RESOURCE, DEFAULT) == row.id,
            "report": row.report,
            "created_at": row.created_at,
        }
        return Corpus.model_validate(document)


def _build(upload: Path, out: Path) -> CorpusReport:
    try:
        return build_corpus(corpus_lines(upload, DEFAULT_LIMITS.line_bytes), out)
    except CorpusRefused as refused:
        found = tuple(Problem(("line", f.line), f.message) for f in refused.report.findings[:50])
        counted = ", ".join(f"{code}: {count:,}" for code, count in refused.report.counts.items())
        why = f" ({counted})" if counted else ""
        raise InvalidError(
            f"{refused}{why}; a line is {{title, text}} or {{title, sentences}} as JSON",
            code="no_page_kept",
            problems=found,
        ) from None
    except CorpusUnreadable as error:
        raise InvalidError(str(error), code="bad_corpus") from None


def _no_default(names: list[str]) -> InvalidError:
    way_out = (
        f"name one ({', '.join(names)}), or POST /corpora/{names[0]}/promote"
        if names
        else "POST /corpora one (the first becomes the default), or run: veritune corpora fetch wiki-leads"
    )
    return InvalidError(
        f"no corpus is named and there is no default; {way_out}",
        code="no_corpus",
        problems=(Problem(("corpus",), "missing, and no default is set", way_out),),
    )


def _choose_name(unit: Unit, name: str | None, filename: str, digest: str) -> str:
    def taken(wanted: str) -> bool:
        row = unit.corpora.find(wanted)
        return row is not None and row.digest != digest  # another upload may store the same pages now

    return choose_name(name, filename, taken, "corpus")


def _resolve_row(unit: Unit, reference: str | None) -> CorpusRow:
    wanted = reference or unit.aliases.find_target(RESOURCE, DEFAULT)
    if wanted is None:
        raise _no_default(names=[row.name for row in unit.corpora.list_corpora(None, SUGGESTED)[0]])
    return _get_row(unit, wanted)


def _get_row(unit: Unit, reference: str) -> CorpusRow:
    row = unit.corpora.find(reference)
    if row is None:
        raise NotFoundError(f"there is no corpus {reference!r}; GET /corpora lists them", code="unknown_corpus")
    return row
