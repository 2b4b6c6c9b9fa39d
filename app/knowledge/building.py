"""Builds a corpus file from uploaded JSON lines, in constant memory and with reproducible bytes.

A line is one page: `{"title": …, "text": …}` or `{"title": …, "sentences": […]}`, with `aliases`
and `url` as optional keys. A bad line is a finding with its line number. One valid page is enough for a corpus.
"""

import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from app.domain.claims import forbidden_character
from app.domain.corpora import CorpusFinding, CorpusPage, CorpusReport, clean_page_text, page_name_key, split_sentences
from app.domain.strict_json import RepeatedKeyError, parse_row
from app.knowledge import index


@dataclass(frozen=True, slots=True)
class CorpusLimits:
    """Limits on one line. `findings`: the most findings listed for each code."""

    line_bytes: int = 8 * 2**20
    title_characters: int = 200
    page_characters: int = 1_000_000
    sentence_characters: int = 1_000
    aliases: int = 100
    url_characters: int = 2_000
    findings: int = 20


DEFAULT_LIMITS = CorpusLimits()


class CorpusRefused(Exception):
    """An upload has no valid page; `report` says why."""

    def __init__(self, report: CorpusReport) -> None:
        super().__init__("no page could be kept" if report.lines else "there is no line in it")
        self.report = report


def build_corpus(lines: Iterable[bytes | None], out: Path, *, limits: CorpusLimits = DEFAULT_LIMITS) -> CorpusReport:
    """Writes the corpus file `out` atomically. Raises CorpusRefused when no page is valid.

    None stands for a line of more than `limits.line_bytes`.
    The bytes depend only on the valid pages, their order and the SQLite library's version.
    """
    report = _ReportBuilder(limits)
    with TemporaryDirectory(prefix=".corpus-", dir=out.parent) as folder:
        sealed = Path(folder) / "sealed"
        with closing(_open_draft(Path(folder) / "draft")) as connection:
            for line in lines:
                _add_line(connection, line, report)
            if not report.pages:
                raise CorpusRefused(report.build())
            _seal(connection, sealed)
        os.replace(sealed, out)
    return report.build()


@dataclass(slots=True)
class _ReportBuilder:
    """Counts pages and findings while lines are added."""

    limits: CorpusLimits
    lines: int = 0
    pages: int = 0
    sentences: int = 0
    characters: int = 0
    refused: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[CorpusFinding] = field(default_factory=list)

    def warn(self, code: str, message: str) -> None:
        self._add_finding(CorpusFinding(line=self.lines, code=code, severity="warned", message=message))

    def refuse(self, refusal: "_PageRefused") -> None:
        self.refused += 1
        self._add_finding(CorpusFinding(line=self.lines, code=refusal.code, severity="refused", message=str(refusal)))

    def _add_finding(self, finding: CorpusFinding) -> None:
        self.counts[finding.code] += 1
        if self.counts[finding.code] <= self.limits.findings:
            self.findings.append(finding)

    def build(self) -> CorpusReport:
        return CorpusReport(
            lines=self.lines,
            pages=self.pages,
            sentences=self.sentences,
            characters=self.characters,
            refused=self.refused,
            counts=dict(sorted(self.counts.items())),
            findings=tuple(self.findings),
            findings_left_out=self.counts.total() - len(self.findings),
        )


class _PageRefused(Exception):
    """A line is not a valid page."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


# --- the file ------------------------------------------------------------------------------


def _open_draft(path: Path) -> sqlite3.Connection:
    """A temporary database without crash safety. `_seal` copies it."""
    connection = sqlite3.connect(path, isolation_level=None)
    for setting in ("page_size = 4096", "journal_mode = OFF", "synchronous = OFF", "secure_delete = OFF"):
        connection.execute(f"PRAGMA {setting}")
    index.create(connection)
    connection.execute("BEGIN")
    return connection


def _seal(connection: sqlite3.Connection, path: Path) -> None:
    """Copies the draft to `path`, compacted, so that the file layout does not depend on the insertion history."""
    index.optimize(connection)
    connection.execute("COMMIT")
    connection.execute("VACUUM INTO ?", (str(path),))
    with path.open("rb") as file:
        os.fsync(file.fileno())


# --- a line --------------------------------------------------------------------------------

_KEYS = ("title", "text", "sentences", "aliases", "url")
_FORBIDDEN = re.compile("[\0\ud800-\udfff]")
_URL = re.compile(r"https?://[^\s<>\"]+")


def _add_line(connection: sqlite3.Connection, line: bytes | None, report: _ReportBuilder) -> None:
    report.lines += 1
    if line is not None and not line.strip():
        return
    try:
        record = _record(line, report)
        page = _page(record, report)
    except _PageRefused as refusal:
        report.refuse(refusal)
        return
    if index.has_title(connection, page.title):
        report.warn("duplicate_title", f"another page is called {page.title!r}; the first is kept")
        return
    index.add(connection, report.pages + 1, page)
    report.pages += 1
    report.sentences += len(page.sentences)
    report.characters += sum(map(len, page.sentences))


def _record(line: bytes | None, report: _ReportBuilder) -> dict[str, object]:
    if line is None or len(line) > report.limits.line_bytes:
        raise _PageRefused("line_too_long", f"the line has more than {report.limits.line_bytes:,} bytes")
    try:
        record = parse_row(line.decode())
    except UnicodeDecodeError as error:
        raise _PageRefused("bad_utf8", f"byte {error.start + 1} of the line is not UTF-8") from None
    except RepeatedKeyError as error:
        raise _PageRefused("repeated_key", f"{error}; keep one of them") from None
    except RecursionError:
        raise _PageRefused("bad_json", "the line is nested too deeply") from None
    except ValueError as error:
        raise _PageRefused("bad_json", f"the line is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise _PageRefused("not_an_object", 'a line is an object such as {"title": "…", "text": "…"}')
    for key in record.keys() - set(_KEYS):
        report.warn("extra_key", f"the key {_quote(key)} is not used")
    return record


def _page(record: dict[str, object], report: _ReportBuilder) -> CorpusPage:
    title = _title(record, report.limits)
    texts = _texts(record, report)
    sentences = tuple(_sentences(texts, report))
    if not sentences:
        raise _PageRefused("empty_text", f"the page {title!r} has no text")
    return CorpusPage(title=title, sentences=sentences, aliases=_aliases(record, report), url=_url(record, report))


def _title(record: dict[str, object], limits: CorpusLimits) -> str:
    given = record.get("title")
    if given is None:
        raise _PageRefused("missing_title", "a page needs a title")
    title = clean_page_text(_require_text(given, "title"))
    if not page_name_key(title):
        raise _PageRefused("missing_title", "the title is empty")
    if len(title) > limits.title_characters:
        raise _PageRefused("title_too_long", f"a title has at most {limits.title_characters:,} characters")
    return title


def _texts(record: dict[str, object], report: _ReportBuilder) -> list[str]:
    """The page's clean sentences: its "sentences", or its "text" split into sentences."""
    given, text = record.get("sentences"), record.get("text")
    if given is None and text is None:
        raise _PageRefused("missing_text", 'a page needs "text" or "sentences"')
    if given is None:
        return split_sentences(clean_page_text(_require_text(text, "text")))
    if text is not None:
        report.warn("text_unused", 'the page has "sentences", so its "text" is not used')
    if not isinstance(given, list):
        raise _PageRefused("bad_type", '"sentences" is a list of strings')
    return [clean_page_text(_require_text(sentence, "sentences")) for sentence in given]


def _sentences(texts: list[str], report: _ReportBuilder) -> Iterator[str]:
    limits, room = report.limits, report.limits.page_characters
    for number, text in enumerate(texts):
        if not text:
            report.warn("empty_sentence", f"sentence {number} is empty; later ids move down by one")
        pieces = list(_split_long(text, limits.sentence_characters))
        if len(pieces) > 1:
            report.warn("sentence_cut", f"sentence {number} has {len(text):,} characters; kept in pieces")
        for piece in pieces:
            room -= len(piece)
            if room < 0:
                report.warn("page_cut", f"the page is cut after {limits.page_characters:,} characters")
                return
            yield piece


def _split_long(text: str, limit: int) -> Iterator[str]:
    """Pieces of at most `limit` characters, cut at a space where there is one."""
    start = 0
    while len(text) - start > limit:
        space = text.rfind(" ", start + 1, start + limit + 1)
        end = space if space > 0 else start + limit
        yield text[start:end]
        start = end + 1 if space > 0 else end
    if start < len(text):
        yield text[start:]


def _aliases(record: dict[str, object], report: _ReportBuilder) -> tuple[str, ...]:
    given = record.get("aliases")
    if given is None:
        return ()
    if not isinstance(given, list):
        raise _PageRefused("bad_type", '"aliases" is a list of strings')
    limits = report.limits
    aliases = [clean_page_text(_require_text(alias, "aliases")) for alias in given[: limits.aliases]]
    kept = [alias for alias in aliases if page_name_key(alias) and len(alias) <= limits.title_characters]
    if len(kept) < len(given):
        report.warn("alias_unused", f"{len(given) - len(kept)} aliases are empty, too long or too many")
    return tuple(dict.fromkeys(kept))


def _url(record: dict[str, object], report: _ReportBuilder) -> str | None:
    given = record.get("url")
    if given is None:
        return None
    url = _require_text(given, "url").strip()
    if len(url) <= report.limits.url_characters and _URL.fullmatch(url):
        return url
    report.warn("url_unused", 'a "url" begins with http:// or https:// and holds no spaces')
    return None


def _require_text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise _PageRefused("bad_type", f'"{key}" holds {_quote(value)} where text is expected')
    if _FORBIDDEN.search(value):
        raise _PageRefused("bad_character", f'"{key}" holds {forbidden_character(value)}')
    return value


def _quote(value: object) -> str:
    """A user's value, shortened and printable."""
    shown = ascii(value) if isinstance(value, str | int | float | bool) else f"a {type(value).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
