"""Building a corpus: what is kept, what is said about the rest, and the same bytes every time."""

import json
import sqlite3
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.domain.corpora import CorpusReport
from app.ingest.corpus_lines import corpus_lines
from app.knowledge.building import CorpusLimits, CorpusRefused, build_corpus
from app.knowledge.corpus import CorpusFile, file_digest
from tests.conftest import ROOT, SHARED, needs_shared_data

GOOD = {"title": "Marlow Bridge", "text": "It is a bridge. It opened in 1832."}


def line(**record: Any) -> bytes:
    return json.dumps(record).encode() + b"\n"


def built(tmp_path: Path, *lines: bytes | None, limits: CorpusLimits | None = None) -> CorpusReport:
    """The report on a good page followed by these lines."""
    return build_corpus([line(**GOOD), *lines], tmp_path / "c.corpus", limits=limits or CorpusLimits())


def sentences(path: Path, title: str) -> tuple[str, ...]:
    corpus = CorpusFile(path, None)
    page = corpus.search(title).page
    corpus.close()
    assert page is not None
    return page.sentences


@needs_shared_data
class TestRealPages:
    @pytest.mark.parametrize(("name", "pages", "count"), [("wiki_leads", 10_033, 36_307), ("fever_pages", 623, 2_138)])
    def test_every_page_is_kept(self, tmp_path: Path, name: str, pages: int, count: int) -> None:
        lines = corpus_lines(SHARED / f"{name}.jsonl", CorpusLimits().line_bytes)
        report = build_corpus(lines, tmp_path / "real.corpus")
        assert (report.lines, report.pages, report.sentences) == (pages, pages, count)
        assert (report.refused, report.counts, report.findings) == (0, {}, ())
        with closing(sqlite3.connect(tmp_path / "real.corpus")) as connection:
            segments = connection.execute("SELECT count(DISTINCT segid) FROM words_idx").fetchone()
        assert segments == (1,)


class TestTheFile:
    def test_the_same_pages_give_the_same_bytes(self, tmp_path: Path) -> None:
        lines = (ROOT / "examples" / "corpus.jsonl").read_bytes().splitlines()
        build_corpus(lines, tmp_path / "one.corpus")
        build_corpus(iter([*lines, b"{}", lines[0]]), tmp_path / "two.corpus")
        build_corpus(lines[:-1], tmp_path / "three.corpus")
        one, two, three = (file_digest(tmp_path / f"{n}.corpus") for n in ("one", "two", "three"))
        assert one == two != three
        corpus = CorpusFile(tmp_path / "one.corpus", "corp_1")
        assert corpus.snapshot == one
        corpus.close()

    def test_nothing_else_is_left_beside_it(self, tmp_path: Path) -> None:
        built(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["c.corpus"]

    def test_an_upload_that_breaks_off_leaves_nothing(self, tmp_path: Path) -> None:
        def broken() -> Iterator[bytes]:
            yield line(**GOOD)
            raise ConnectionResetError

        with pytest.raises(ConnectionResetError):
            build_corpus(broken(), tmp_path / "c.corpus")
        assert list(tmp_path.iterdir()) == []

    def test_memory_does_not_grow_with_the_input(self, tmp_path: Path) -> None:
        def pages(count: int) -> Iterator[bytes]:
            return (line(title=f"Page {n}", text=f"It is page {n}. " * 60) for n in range(count))

        def peak(lines: Iterable[bytes]) -> int:
            tracemalloc.start()
            build_corpus(lines, tmp_path / "c.corpus")
            highest = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return highest

        peak(pages(10))  # what is only ever made once
        few, many = (min(peak(pages(count)) for _ in range(3)) for count in (60, 600))  # other threads take some, too
        assert many < few + 100_000


class TestWhatIsKept:
    def test_text_is_normalised_escaped_and_split(self, tmp_path: Path) -> None:
        text = "It is `` old '' .\nThought 1: so it is -LRB- they say -RRB- ."
        report = built(tmp_path, line(title="Old_Mill", text=text))
        kept = ('It is "old".', "Thought 1, so it is (they say).")
        assert sentences(tmp_path / "c.corpus", "old mill") == kept
        assert (report.pages, report.sentences) == (2, 4)
        assert report.characters == sum(map(len, (*kept, "It is a bridge.", "It opened in 1832.")))

    def test_given_sentences_stay_as_they_are_cut(self, tmp_path: Path) -> None:
        built(tmp_path, line(title="Mill", sentences=["It is old. Very old.", "It turns."]))
        assert sentences(tmp_path / "c.corpus", "Mill") == ("It is old. Very old.", "It turns.")

    def test_blank_lines_and_carriage_returns_are_no_matter(self, tmp_path: Path) -> None:
        lines = [line(**GOOD), b"\r\n", line(title="B", text="It is b.").replace(b"\n", b"\r\n")]
        report = build_corpus(lines, tmp_path / "c.corpus")
        assert (report.lines, report.pages, report.counts) == (3, 2, {})

    def test_a_long_sentence_is_kept_in_pieces(self, tmp_path: Path) -> None:
        limits = CorpusLimits(sentence_characters=10)
        report = built(tmp_path, line(title="Long", text="one two three four " + "x" * 25), limits=limits)
        pieces = ("one two", "three four", "x" * 10, "x" * 10, "x" * 5)
        assert sentences(tmp_path / "c.corpus", "Long") == pieces
        assert report.counts["sentence_cut"] == 3  # two of them are the good page's

    def test_a_long_page_is_cut_after_whole_sentences(self, tmp_path: Path) -> None:
        limits = CorpusLimits(page_characters=40)
        report = built(tmp_path, line(title="Long", text="It is a page. " * 9), limits=limits)
        assert sentences(tmp_path / "c.corpus", "Long") == ("It is a page.",) * 3
        assert report.counts == {"page_cut": 1}


WARNED = [
    ("duplicate_title", line(title="Marlow  Bridge", text="Another.")),
    ("extra_key", line(title="A", text="It is.", id=7)),
    ("text_unused", line(title="A", text="It was.", sentences=["It is."])),
    ("empty_sentence", line(title="A", sentences=["It is.", "", "So."])),
    ("alias_unused", line(title="A", text="It is.", aliases=["B", "", "x" * 300])),
    ("url_unused", line(title="A", text="It is.", url="javascript:alert(1)")),
]
REFUSED = [
    ("bad_json", b"title,text\n"),
    ("bad_json", b'{"title": "A", "text": \n'),
    ("bad_json", b"[" * 100_000 + b"]" * 100_000),
    ("bad_json", b'{"title": "A", "text": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
    ("bad_json", b'{"title": ' + b"9" * 5_000 + b"}"),
    ("bad_utf8", b'{"title": "caf\xe9", "text": "It is."}'),
    ("bad_utf8", b"\x89PNG\r\n"),
    ("repeated_key", b'{"title": "A", "text": "It is.", "title": "B"}'),
    ("not_an_object", b'["A", "It is."]'),
    ("not_an_object", b"null"),
    ("missing_title", line(text="It is.")),
    ("missing_title", line(title=None, text="It is.")),
    ("missing_title", line(title=" _ ", text="It is.")),
    ("title_too_long", line(title="x" * 201, text="It is.")),
    ("missing_text", line(title="A")),
    ("empty_text", line(title="A", text=" \n")),
    ("empty_text", line(title="A", sentences=[])),
    ("empty_text", line(title="A", text="\u200b")),
    ("empty_text", line(title="A", text="\u3164")),
    ("empty_text", line(title="A", sentences=["\u2800", "\u115f\ufe0f"])),
    ("missing_title", line(title="\u3164", text="It is.")),
    ("bad_type", line(title=2001, text="It is.")),
    ("bad_type", line(title="A", text=["It is."])),
    ("bad_type", line(title="A", sentences="It is.")),
    ("bad_type", line(title="A", sentences=["It is.", 7])),
    ("bad_type", line(title="A", text="It is.", aliases="B")),
    ("bad_type", line(title="A", text="It is.", url=7)),
    ("bad_character", line(title="A", text="It\0is.")),
    ("bad_character", line(title="A", text="It \ud800 is.")),
    ("bad_character", line(title="A\udfff", text="It is.")),
    ("line_too_long", line(title="A", text="It is. " * 2_000_000)),
    ("line_too_long", None),
]


class TestFindings:
    @pytest.mark.parametrize(("code", "bad"), WARNED, ids=[code for code, _ in WARNED])
    def test_what_is_warned_of(self, tmp_path: Path, code: str, bad: bytes) -> None:
        report = built(tmp_path, b"\n", bad)
        assert [(f.line, f.severity) for f in report.findings if f.code == code] == [(3, "warned")]
        assert (report.counts[code], report.refused) == (1, 0)

    @pytest.mark.parametrize(("code", "bad"), REFUSED, ids=[f"{n}-{r[0]}" for n, r in enumerate(REFUSED)])
    def test_what_is_refused(self, tmp_path: Path, code: str, bad: bytes | None) -> None:
        report = built(tmp_path, bad, line(title="After", text="It is kept."))
        (finding,) = (finding for finding in report.findings if finding.severity == "refused")
        assert (finding.line, finding.code, report.refused, report.pages) == (2, code, 1, 2)
        assert len(finding.message.encode()) < 300

    def test_the_list_is_bounded_for_each_code_and_the_counts_are_exact(self, tmp_path: Path) -> None:
        warned = [line(title=f"P{n}", text="It is.", id=n) for n in range(5_000)]
        report = built(tmp_path, *warned, *[b"oops"] * 10_000)
        assert report.counts == {"bad_json": 10_000, "extra_key": 5_000}
        assert (report.refused, report.pages, report.lines) == (10_000, 5_001, 15_001)
        assert len(report.findings) == 40
        assert report.findings_left_out == 14_960
        assert {finding.code for finding in report.findings} == {"bad_json", "extra_key"}

    @pytest.mark.parametrize(("lines", "says"), [([], "no line"), ([b"\n", b"{}"], "no page")])
    def test_without_a_page_there_is_no_corpus(self, tmp_path: Path, lines: list[bytes], says: str) -> None:
        with pytest.raises(CorpusRefused, match=says) as caught:
            build_corpus(lines, tmp_path / "c.corpus")
        assert caught.value.report.lines == len(lines)
        assert list(tmp_path.iterdir()) == []
