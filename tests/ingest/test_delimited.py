"""CSV as people write it, and as they should not."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.domain.datasets import Columns, SourceRow
from app.domain.errors import InvalidError
from app.ingest.delimited import read_delimited
from app.ingest.lines import Header
from tests.ingest.files import STEPS, found, read

LIMIT = 1 << 20


def written(rows: list[list[str]], delimiter: str = ",", header: tuple[str, ...] = ("claim", "trajectories")) -> bytes:
    sink = io.StringIO()
    csv.writer(sink, delimiter=delimiter).writerows([list(header), *rows])
    return sink.getvalue().encode()


def test_a_record_is_named_by_the_line_where_it_begins(tmp_path: Path) -> None:
    report, kept = read(tmp_path, written([["One.", STEPS], ["Two.", "nothing"], ["Three.", STEPS]]))
    assert report.format == "csv"
    assert [trajectory.claim for trajectory in kept] == ["One.", "Three."]
    assert found(report) == [(7, "no_steps")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_seen(tmp_path: Path, delimiter: str) -> None:
    rows = [["One, two; three\t.", STEPS, "SUPPORTS"]]
    report, kept = read(tmp_path, written(rows, delimiter, ("claim", "trajectories", "label")))
    assert kept[0].claim == "One, two; three ."
    assert report.columns == {"claim": "claim", "trajectories": "trajectories", "label": "label"}


def test_a_byte_order_mark_and_spaces_around_names_do_no_harm(tmp_path: Path) -> None:
    content = written([["One.", STEPS]], header=(" claim", "trajectories "))
    assert read(tmp_path, b"\xef\xbb\xbf" + content)[0].rows_kept == 1


@pytest.mark.parametrize("first", ["sep=;\r\n", "SEP=;\n", '"sep=;"\r\n', "\ufeffsep=;\r\n"])
def test_a_line_that_names_the_delimiter_is_read(tmp_path: Path, first: str) -> None:
    content = first.encode() + written([["One, two.", STEPS, "a,b,c"]], ";", ("claim", "trajectories", "a,b,c,d"))
    report, kept = read(tmp_path, content, "a.csv")
    assert kept[0].claim == "One, two."
    assert found(report) == [(2, "extra_column")]


@pytest.mark.parametrize("within_a_cell", [b"\r", b"\n"])
def test_lines_may_end_in_carriage_returns_alone(tmp_path: Path, within_a_cell: bytes) -> None:
    content = written([["One.", STEPS], ["Two.", "nothing"], ["Three.", STEPS]])
    content = content.replace(b"\r\n", b"\r").replace(b"\n", within_a_cell)
    report, kept = read(tmp_path, content)
    assert [trajectory.claim for trajectory in kept] == ["One.", "Three."]
    assert found(report) == [(7, "no_steps")]
    long = content + b"Four.," + b"x" * 5_000 + b"\rFive.," + b"y\r"
    assert found(read(tmp_path, long, row_bytes=2_000)[0])[1:] == [(13, "line_too_long"), (14, "no_steps")]


def test_two_files_that_were_joined_are_read(tmp_path: Path) -> None:
    one, two = (b"\xef\xbb\xbf" + written([[claim, STEPS]]) for claim in ("One.", "Two."))
    report, kept = read(tmp_path, one + two)
    assert [trajectory.claim for trajectory in kept] == ["One.", "Two."]
    assert (report.rows_read, report.codes) == (2, {})


@pytest.mark.parametrize("end", ['"', ""])
def test_two_files_that_were_joined_without_a_line_break_are_told_so(tmp_path: Path, end: str) -> None:
    two = b"\xef\xbb\xbf" + written([["Two.", STEPS]])
    report, _ = read(tmp_path, written([["Nil.", STEPS]]) + f"One.,{end}x{end}".encode() + two)
    assert "two files were joined without a line break" in report.findings[0].message
    assert (report.findings[0].line, report.rows_kept) == (7, 2)


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    content = b"\r\n" + written([["One.", STEPS]]) + b"\r\n\r\n"
    report, _ = read(tmp_path, content)
    assert (report.rows_read, report.rows_kept) == (1, 1)


def test_columns_that_are_not_read_are_said_once(tmp_path: Path) -> None:
    header = ("id", "claim", "trajectories", "steps")
    report, _ = read(tmp_path, written([["1", "One.", STEPS, "3"], ["2", "Two.", STEPS, "3"]], header=header))
    assert found(report) == [(1, "extra_column"), (1, "extra_column")]
    assert (report.rows_kept, report.rows_warned) == (2, 0)


def test_a_row_of_other_width_is_refused(tmp_path: Path) -> None:
    content = written([["One.", STEPS], ["Two.", STEPS, "x"], ["Three."]])
    report, _ = read(tmp_path, content)
    assert found(report) == [(7, "wrong_fields"), (12, "wrong_fields")]


def test_a_row_that_is_not_utf8_is_refused_and_the_others_are_kept(tmp_path: Path) -> None:
    content = written([["One.", STEPS], ["Two#.", STEPS], ["Three.", STEPS]]).replace(b"#", b"\xe9")
    report, kept = read(tmp_path, content)
    assert found(report) == [(7, "bad_utf8")]
    assert [trajectory.claim for trajectory in kept] == ["One.", "Three."]


def test_a_file_that_is_latin_1_everywhere_says_so(tmp_path: Path) -> None:
    content = written([[f"Zo# {n}.", STEPS] for n in range(3)]).replace(b"#", b"\xeb")
    with pytest.raises(InvalidError, match="save the file as UTF-8") as caught:
        read(tmp_path, content, "a.csv")
    assert caught.value.code == "not_utf8"


def test_a_header_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="line 1: the header is not UTF-8"):
        read(tmp_path, b"claim,trajectories,caf\xe9\n1,2,3\n", "a.csv")


def test_a_nul_refuses_its_row(tmp_path: Path) -> None:
    content = written([["One.", STEPS], ["Two#.", STEPS]]).replace(b"#", b"\0")
    assert found(read(tmp_path, content)[0]) == [(7, "forbidden_character")]


def test_an_unclosed_quote_costs_its_own_lines_and_says_which(tmp_path: Path) -> None:
    rows = written([["One.", STEPS], ["Two.", STEPS], ["Three.", STEPS], ["Four.", STEPS], ["Five.", STEPS]])
    content = rows.replace(b'Two.,"', b'"Two.,', 1).replace(b'[SUPPORTS]"\r\nThree', b"[SUPPORTS]\r\nThree", 1)
    report, kept = read(tmp_path, content)
    assert [trajectory.claim for trajectory in kept] == ["One.", "Four.", "Five."]
    assert report.codes == {"bad_csv": 1}
    assert "lines 7 to 16 are skipped" in report.findings[0].message


def test_a_quote_left_open_to_the_end_is_one_finding(tmp_path: Path) -> None:
    report, _ = read(tmp_path, written([["One.", STEPS]]) + b'Two.,"Thought 1: Look.\n' + b"more\n" * 50)
    assert found(report) == [(7, "bad_csv")]
    assert "a quote is not closed; lines 7 to 57" in report.findings[0].message


def test_a_quote_left_open_in_a_big_file_stops_at_the_limit(tmp_path: Path) -> None:
    content = written([["One.", STEPS]]) + b'Two.,"Thought 1:\n' + b"more\n" * 2_000 + written([["Three.", STEPS]])
    report, kept = read(tmp_path, content, row_bytes=5_000)
    assert kept[0].claim == "One."
    assert found(report)[0] == (7, "line_too_long")


def test_a_line_that_is_too_long_names_the_limit(tmp_path: Path) -> None:
    content = (
        written([["One.", STEPS]])
        + b"x" * 5_000
        + b"\r\n"
        + written([["Three.", STEPS]])[len("claim,trajectories\r\n") :]
    )
    report, kept = read(tmp_path, content, row_bytes=2_000)
    assert found(report) == [(7, "line_too_long")]
    assert "2,000 bytes" in report.findings[0].message
    assert [trajectory.claim for trajectory in kept] == ["One.", "Three."]


@pytest.mark.parametrize(
    ("header", "meant"),
    [
        ("claim_id,statement", "statement"),
        ("claims,claim_id", "claims"),
        ("CLAIM,id", "CLAIM"),
        ("claim_id,page", None),
    ],
)
def test_a_column_is_meant_by_its_meaning_or_misspelt(tmp_path: Path, header: str, meant: str | None) -> None:
    with pytest.raises(InvalidError) as caught:
        read(tmp_path, f"{header},trajectories\n1,One.,x\n".encode(), "a.csv")
    hint = caught.value.problems[0].hint or ""
    assert hint.startswith(f"did you mean {meant!r}?" if meant else "rename the column")


def test_a_missing_column_is_named_with_those_found(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"found: 'claim', 'trajectory'.*did you mean 'trajectory'") as caught:
        read(tmp_path, b"claim,trajectory\nOne.,x\n", "a.csv")
    assert caught.value.code == "missing_column"
    assert caught.value.problems[0].loc == ("trajectories_column",)


def test_a_name_that_stands_twice_is_refused_if_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="2 columns are called 'claim'") as caught:
        read(tmp_path, written([["One.", "x", STEPS]], header=("claim", "claim", "trajectories")))
    assert caught.value.code == "duplicate_column"
    extra = written([["One.", "", "", STEPS]], header=("claim", "", "", "trajectories"))
    assert read(tmp_path, extra)[0].rows_kept == 1


def test_other_names_are_mapped(tmp_path: Path) -> None:
    content = written([["One.", STEPS, "SUPPORTS"]], header=("statement", "trace", "gold"))
    mapping = {"claim": "statement", "trajectories": "trace", "label": "gold"}
    report, _ = read(tmp_path, content, columns=mapping)
    assert report.columns == mapping
    assert report.codes == {}


_FIELD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=20)


@given(
    rows=st.lists(st.tuples(_FIELD, _FIELD), max_size=6),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_csv_writer_writes_is_read_back(
    tmp_path: Path, rows: list[tuple[str, str]], delimiter: str, end: str
) -> None:
    sink = io.StringIO()
    table = csv.writer(sink, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    table.writerows([["claim", "trajectories"], *rows])
    path = tmp_path / "rows.csv"
    path.write_bytes(sink.getvalue().encode())
    header, *items = read_delimited(path, Columns(), LIMIT)
    assert isinstance(header, Header)
    line = 2
    for (claim, trace), item in zip(rows, items, strict=True):
        assert item == SourceRow(line, {"claim": claim, "trajectories": trace})
        line += (claim + trace).count("\n") + 1


@given(content=st.binary(max_size=400), limit=st.integers(10, 200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_behind_a_header_are_read_to_the_end(tmp_path: Path, content: bytes, limit: int) -> None:
    path = tmp_path / "any.csv"
    path.write_bytes(b"claim,trajectories\n" + content + b'\n"End.","x"\n')
    items = list(read_delimited(path, Columns(), max(limit, 40)))
    last = path.read_bytes().count(b"\n")
    assert all(1 <= item.line <= last for item in items)
