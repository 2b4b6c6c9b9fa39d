"""JSONL and JSON documents: rows with their lines, and every way in which JSON goes wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.domain.errors import InvalidError
from app.ingest.json_array import cut_items
from tests.ingest.files import STEPS, found, json_line, read, row

GOOD = json_line(row())
DEEP = b"[" * 100_000 + b"]" * 100_000


def test_each_line_is_a_row(tmp_path: Path) -> None:
    report, kept = read(tmp_path, b"\n" + GOOD + b"  \n" + json_line(row(2)) + json_line(row(3)).rstrip())
    assert report.format == "jsonl"
    assert [trajectory.claim[-2] for trajectory in kept] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"claim": ', "bad_json"),
        (b'{"claim": "One.", "claim": "Two."}', "repeated_key"),
        (b'{"claim": "One.", "steps": [{"thought": "a", "thought": "b"}]}', "repeated_key"),
        (b'{"claim": "One.", "extra": {"a": {"b": 1, "b": 1}}}', "repeated_key"),
        (b"[1, 2]", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b'{"claim": ' + DEEP + b"}", "bad_json"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "bad_json"),
        (b'{"claim": ' + b"9" * 5_000 + b"}", "bad_json"),
        (b'{"claim": "x", "trajectories": 1e999}', "missing_trajectory"),
        (b'{"claim": "caf\xe9"}', "bad_utf8"),
        (json_line(row(2, claim="a\ud800")).strip(), "forbidden_character"),
        (json_line(row(2, claim="a\0")).strip(), "forbidden_character"),
        (json_line(row(2, trajectories=STEPS + "\ud800")).strip(), "forbidden_character"),
        (b'{"claim": "a\0b"}', "bad_json"),
        (b'{"claim": "x", "pad": "' + b"x" * 30_000 + b'", ' + DEEP, "bad_json"),
    ],
)
def test_a_broken_line_is_one_refused_row(tmp_path: Path, line: bytes, code: str) -> None:
    for content, name, at in [
        (GOOD + line + b"\n" + json_line(row(3)), "a.jsonl", 2),
        (b"[\n" + GOOD + b",\n" + line + b",\n" + json_line(row(3)) + b"]", "a.json", 4),
    ]:
        if name == "a.json" and code == "bad_json" and not line.endswith(b"}"):
            continue  # an item whose brackets do not match takes the document with it; see below
        report, kept = read(tmp_path, content, name)
        refused = [finding for finding in report.findings if finding.severity == "refused"]
        assert [(finding.line, finding.code) for finding in refused] == [(at, code)]
        assert len(kept) == 2


def test_a_line_that_is_too_long_is_one_refused_row(tmp_path: Path) -> None:
    long = json_line(row(2, claim="x" * 50_000))
    content = GOOD + long + json_line(row(3))
    report, _ = read(tmp_path, content, row_bytes=10_000)
    assert found(report) == [(2, "line_too_long")]
    array = b"[" + GOOD + b"," + long + b"," + json_line(row(3)) + b"]"
    report, _ = read(tmp_path, array, row_bytes=10_000)
    assert found(report) == [(2, "line_too_long")]
    assert "10,000 bytes" in report.findings[0].message


def test_a_name_with_a_lone_surrogate_does_no_harm(tmp_path: Path) -> None:
    report, _ = read(tmp_path, json_line(row() | {"\ud800": 1}))
    assert found(report) == [(1, "extra_column")]
    report.model_dump_json()


def test_keys_that_are_not_read_are_said_once(tmp_path: Path) -> None:
    content = json_line(row(1, answer=1)) + json_line(row(2, answer=1, correct=True, steps=4))
    report, _ = read(tmp_path, content)
    assert found(report) == [(1, "extra_column"), (2, "extra_column"), (2, "extra_column")]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([row(1), row(2)]).encode(),
        json.dumps([row(1), row(2)], indent=2).encode(),
        json.dumps({"version": 1, "meta": {"tags": ["a"]}, "data": [row(1), row(2)]}).encode(),
        json.dumps({"data": [row(1), row(2)], "end": "]"}, indent=1).encode(),
        b"\xef\xbb\xbf \n" + json.dumps([row(1), row(2)]).encode() + b"\n",
    ],
)
def test_a_document_holds_its_rows_in_an_array(tmp_path: Path, content: bytes) -> None:
    report, kept = read(tmp_path, content)
    assert report.format == "json"
    assert [trajectory.claim[-2] for trajectory in kept] == ["1", "2"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("keys", [("0", "1"), ("fever-7", "fever-8"), ("10", '"[{')])
def test_rows_may_be_keyed_by_an_index(tmp_path: Path, indent: int | None, keys: tuple[str, str]) -> None:
    content = json.dumps({key: row(number) for number, key in enumerate(keys, start=1)}, indent=indent).encode()
    report, kept = read(tmp_path, content, "rows.json")
    assert (report.format, [trajectory.claim[-2] for trajectory in kept]) == ("json", ["1", "2"])


def test_a_row_keyed_by_an_index_is_named_by_its_line(tmp_path: Path) -> None:
    rows = {"0": row(1), "1": 3, "2": row(2), "3": row(3, claim="x" * 3_000), "4": row(4)}
    report, kept = read(tmp_path, json.dumps(rows, indent=1).encode(), row_bytes=2_000)
    assert found(report) == [(6, "not_an_object"), (11, "line_too_long")]
    assert len(kept) == 3


def test_lines_may_end_in_carriage_returns_alone(tmp_path: Path) -> None:
    report, kept = read(tmp_path, (GOOD + b"{\n" + json_line(row(2))).replace(b"\n", b"\r"))
    assert (len(kept), found(report)) == (2, [(2, "bad_json")])


def test_files_that_were_joined_are_read_or_told_so(tmp_path: Path) -> None:
    second = b"\xef\xbb\xbf" + json_line(row(2))
    assert read(tmp_path, GOOD + second)[0].rows_kept == 2
    report, _ = read(tmp_path, GOOD + GOOD.rstrip() + second + json_line(row(3)))
    assert (report.rows_kept, found(report)) == (2, [(2, "bad_json")])
    assert "two files were joined without a line break" in report.findings[0].message
    inside = json_line(row(1, claim="One \ufeff word."))
    assert read(tmp_path, inside.decode().encode())[0].rows_kept == 1


def test_an_object_alone_may_be_a_row(tmp_path: Path) -> None:
    steps = [{"thought": "", "action": "Finish[SUPPORTS]"}]
    content = json.dumps({"claim": "One.", "steps": steps}, indent=2).encode()
    assert read(tmp_path, content, "one.json")[1][0].claim == "One."


def test_an_object_alone_that_is_too_long_says_so(tmp_path: Path) -> None:
    """Its list of steps is no list of rows."""
    steps = [{"thought": "x" * 3_000, "action": "Finish[SUPPORTS]"}]
    content = json.dumps({"claim": "One.", "steps": steps}, indent=2).encode()
    with pytest.raises(InvalidError, match="line_too_long: 1"):
        read(tmp_path, content, "one.json", row_bytes=2_000)


def test_an_object_alone_that_repeats_a_key_says_so(tmp_path: Path) -> None:
    content = b'{"claim": "One.",\n "claim": "Two.", "steps": [{"action": "Finish[SUPPORTS]"}]}'
    with pytest.raises(InvalidError, match="repeated_key: 1"):
        read(tmp_path, content, "one.json")


def test_an_item_is_named_by_its_line(tmp_path: Path) -> None:
    content = json.dumps([row(1), {"claim": "Two."}, 3], indent=1).encode()
    report, _ = read(tmp_path, content)
    assert found(report) == [(6, "missing_trajectory"), (9, "not_an_object")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" + GOOD, "the file ends inside the document"),
        (b"[" + GOOD + b',\n{"claim": "x', "the item on line 3 is not closed"),
        (b"[" + GOOD + b"] x", "unexpected text before or after"),
        (b"[" + GOOD + b'{"a": [1}]', "ends inside"),
        (b"[" * 100_000, "ends inside"),
        (b'{"a": [], "b": []}', "several arrays"),
    ],
)
def test_a_document_that_is_not_whole_is_refused_whole(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(InvalidError, match=says) as caught:
        read(tmp_path, content, "a.json")
    assert caught.value.code in ("bad_json", "ambiguous_array")


def test_a_deep_document_has_no_row(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="bad_json: 1") as caught:
        read(tmp_path, DEEP, "deep.json")
    assert caught.value.code == "no_rows_kept"


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(['"', "\\", "[", "}", "\\\\"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(
    values=st.lists(_VALUES, max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    wrapped=st.booleans(),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_items_are_cut_where_they_stand_whatever_the_chunks(
    tmp_path: Path, values: list[object], indent: int | None, wrapped: bool, ascii_only: bool, chunk: int
) -> None:
    document = {"a": {"b": [1]}, "rows": values, "c": "[{"} if wrapped else values
    written = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    path = tmp_path / "document.json"
    path.write_bytes(written)
    items = list(cut_items(path, 1 << 20, chunk))
    assert [json.loads(raw.decode(errors="surrogatepass")) for _, raw in items if raw is not None] == values
    lines = written.split(b"\n")
    for line, raw in items:
        assert raw is not None
        assert raw.split(b"\n")[0].strip() in lines[line - 1]


@given(content=st.binary(max_size=60), chunk=st.integers(1, 9))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_cut_or_refused(tmp_path: Path, content: bytes, chunk: int) -> None:
    path = tmp_path / "any.json"
    path.write_bytes(b"[" + content)
    try:
        items = list(cut_items(path, 30, chunk))
    except InvalidError:
        return
    assert all(raw is None or len(raw) <= 30 for _, raw in items)
