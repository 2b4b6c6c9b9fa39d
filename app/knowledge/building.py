"""From uploaded JSON lines to a corpus file, in constant memory and to the same bytes every time.

A line is one page: `{"title": …, "text": …}` or `{"title": …, "sentences": […]}`, with `aliases`
and `url` if there are any. What is wrong with a line is a finding about that line; one kept page
makes a corpus. Where lines come from and where the file goes is the caller's affair.
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
from app.domain.corpora import CorpusFinding, CorpusReport, Page, clean, name_key, split_sentences
from app.domain.strict_json import RepeatedKeyError, parse_row
from app.knowledge import index


@dataclass(frozen=True, slots=True)
class CorpusLimits:
    """Bounds on what a line may bring. `findings` is how many are listed for each code."""

    line_bytes: int = 8 * 2**20
    title_characters: int = 200
    page_characters: int = 1_000_000
    sentence_characters: int = 1_000
    aliases: int = 100
    url_characters: int = 2_000
    findings: int = 20


DEFAULT_LIMITS = CorpusLimits()


class CorpusRefused(Exception):
    """No line of an upload could be kept; `report` says why."""

    def __init__(self, report: CorpusReport) -> None:
        super().__init__("no page could be kept" if report.lines else "there is no line in it")
        self.report = report


def build_corpus(lines: Iterable[bytes | None], out: Path, *, limits: CorpusLimits = DEFAULT_LIMITS) -> CorpusReport:
    """Write the corpus file `out`, whole or not at all. Raises CorpusRefused when no page is kept.

    None stands for a line of more than `limits.line_bytes`.
    The bytes depend on the kept pages, their order and the SQLite library's version, on nothing else.
    """
    account = _Account(limits)
    with TemporaryDirectory(prefix=".corpus-", dir=out.parent) as folder:
        sealed = Path(folder) / "sealed"
        with closing(_draft(Path(folder) / "draft")) as connection:
            for line in lines:
                _take(connection, line, account)
            if not account.pages:
                raise CorpusRefused(account.report())
            _seal(connection, sealed)
        os.replace(sealed, out)
    return account.report()


@dataclass(slots=True)
class _Account:
    """What has been kept and found so far, and at which line we are."""

    limits: CorpusLimits
    lines: int = 0
    pages: int = 0
    sentences: int = 0
    characters: int = 0
    refused: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[CorpusFinding] = field(default_factory=list)

    def warn(self, code: str, message: str) -> None:
        self._find(CorpusFinding(line=self.lines, code=code, severity="warned", message=message))

    def refuse(self, refusal: "_Refused") -> None:
        self.refused += 1
        self._find(CorpusFinding(line=self.lines, code=refusal.code, severity="refused", message=str(refusal)))

    def _find(self, finding: CorpusFinding) -> None:
        self.counts[finding.code] += 1
        if self.counts[finding.code] <= self.limits.findings:
            self.findings.append(finding)

    def report(self) -> CorpusReport:
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


class _Refused(Exception):
    """A line that cannot become a page."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


# --- the file ------------------------------------------------------------------------------


def _draft(path: Path) -> sqlite3.Connection:
    """A throw-away database: unsafe against a crash, which is why it is only ever copied from."""
    connection = sqlite3.connect(path, isolation_level=None)
    for setting in ("page_size = 4096", "journal_mode = OFF", "synchronous = OFF", "secure_delete = OFF"):
        connection.execute(f"PRAGMA {setting}")
    index.create(connection)
    connection.execute("BEGIN")
    return connection


def _seal(connection: sqlite3.Connection, path: Path) -> None:
    """Copy the draft, packed, to `path`: the layout then owes nothing to how the draft grew."""
    index.optimize(connection)
    connection.execute("COMMIT")
    connection.execute("VACUUM INTO ?", (str(path),))
    with path.open("rb") as file:
        os.fsync(file.fileno())


# --- a line --------------------------------------------------------------------------------

_KEYS = ("title", "text", "sentences", "aliases", "url")
_FORBIDDEN = re.compile("[\0\ud800-\udfff]")
_URL = re.compile(r"https?://[^\s<>\"]+")


def _take(connection: sqlite3.Connection, line: bytes | None, account: _Account) -> None:
    account.lines += 1
    if line is not None and not line.strip():
        return
    try:
        record = _record(line, account)
        page = _page(record, account)
    except _Refused as refusal:
        account.refuse(refusal)
        return
    if index.has_title(connection, page.title):
        account.warn("duplicate_title", f"another page is called {page.title!r}; the first is kept")
        return
    index.add(connection, account.pages + 1, page)
    account.pages += 1
    account.sentences += len(page.sentences)
    account.characters += sum(map(len, page.sentences))


def _record(line: bytes | None, account: _Account) -> dict[str, object]:
    if line is None or len(line) > account.limits.line_bytes:
        raise _Refused("line_too_long", f"the line has more than {account.limits.line_bytes:,} bytes")
    try:
        record = parse_row(line.decode())
    except UnicodeDecodeError as error:
        raise _Refused("bad_utf8", f"byte {error.start + 1} of the line is not UTF-8") from None
    except RepeatedKeyError as error:
        raise _Refused("repeated_key", f"{error}; keep one of them") from None
    except RecursionError:
        raise _Refused("bad_json", "the line is nested too deep to be a page") from None
    except ValueError as error:
        raise _Refused("bad_json", f"the line is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise _Refused("not_an_object", 'a line is an object such as {"title": "…", "text": "…"}')
    for key in record.keys() - set(_KEYS):
        account.warn("extra_key", f"the key {_shown(key)} is not used")
    return record


def _page(record: dict[str, object], account: _Account) -> Page:
    title = _title(record, account.limits)
    texts = _texts(record, account)
    sentences = tuple(_sentences(texts, account))
    if not sentences:
        raise _Refused("empty_text", f"the page {title!r} has no text")
    return Page(title=title, sentences=sentences, aliases=_aliases(record, account), url=_url(record, account))


def _title(record: dict[str, object], limits: CorpusLimits) -> str:
    given = record.get("title")
    if given is None:
        raise _Refused("missing_title", "a page needs a title")
    title = clean(_string(given, "title"))
    if not name_key(title):
        raise _Refused("missing_title", "the title is empty")
    if len(title) > limits.title_characters:
        raise _Refused("title_too_long", f"a title has at most {limits.title_characters:,} characters")
    return title


def _texts(record: dict[str, object], account: _Account) -> list[str]:
    """The page's sentences, clean: the given ones, or those that its text is split into."""
    given, text = record.get("sentences"), record.get("text")
    if given is None and text is None:
        raise _Refused("missing_text", 'a page needs "text" or "sentences"')
    if given is None:
        return split_sentences(clean(_string(text, "text")))
    if text is not None:
        account.warn("text_unused", 'the page has "sentences", so its "text" is not used')
    if not isinstance(given, list):
        raise _Refused("bad_type", '"sentences" is a list of strings')
    return [clean(_string(sentence, "sentences")) for sentence in given]


def _sentences(texts: list[str], account: _Account) -> Iterator[str]:
    limits, room = account.limits, account.limits.page_characters
    for number, text in enumerate(texts):
        if not text:
            account.warn("empty_sentence", f"sentence {number} is empty; later ids move down by one")
        pieces = list(_cut(text, limits.sentence_characters))
        if len(pieces) > 1:
            account.warn("sentence_cut", f"sentence {number} has {len(text):,} characters; kept in pieces")
        for piece in pieces:
            room -= len(piece)
            if room < 0:
                account.warn("page_cut", f"the page is cut after {limits.page_characters:,} characters")
                return
            yield piece


def _cut(text: str, limit: int) -> Iterator[str]:
    """Pieces of at most `limit` characters, cut at a space where there is one."""
    start = 0
    while len(text) - start > limit:
        space = text.rfind(" ", start + 1, start + limit + 1)
        end = space if space > 0 else start + limit
        yield text[start:end]
        start = end + 1 if space > 0 else end
    if start < len(text):
        yield text[start:]


def _aliases(record: dict[str, object], account: _Account) -> tuple[str, ...]:
    given = record.get("aliases")
    if given is None:
        return ()
    if not isinstance(given, list):
        raise _Refused("bad_type", '"aliases" is a list of strings')
    limits = account.limits
    aliases = [clean(_string(alias, "aliases")) for alias in given[: limits.aliases]]
    kept = [alias for alias in aliases if name_key(alias) and len(alias) <= limits.title_characters]
    if len(kept) < len(given):
        account.warn("alias_unused", f"{len(given) - len(kept)} aliases are empty, too long or too many")
    return tuple(dict.fromkeys(kept))


def _url(record: dict[str, object], account: _Account) -> str | None:
    given = record.get("url")
    if given is None:
        return None
    url = _string(given, "url").strip()
    if len(url) <= account.limits.url_characters and _URL.fullmatch(url):
        return url
    account.warn("url_unused", 'a "url" begins with http:// or https:// and holds no spaces')
    return None


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise _Refused("bad_type", f'"{key}" holds {_shown(value)} where text is expected')
    if _FORBIDDEN.search(value):
        raise _Refused("bad_character", f'"{key}" holds {forbidden_character(value)}')
    return value


def _shown(value: object) -> str:
    """A value from a stranger, short and printable."""
    shown = ascii(value) if isinstance(value, str | int | float | bool) else f"a {type(value).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
