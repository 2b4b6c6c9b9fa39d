"""The report of an upload: exact counts, bounded lists."""

import csv
import io
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from app.domain.claims import Verdict
from app.domain.datasets import FINDINGS_LIMIT, FINDINGS_PER_CODE, Severity, TextLengths
from app.domain.errors import InvalidError
from tests.ingest.files import SEEN, STEPS, found, json_line, read, row


def test_the_same_row_is_kept_once(tmp_path: Path) -> None:
    again = row(1, trajectories=STEPS.replace("\n", " "))
    report, kept = read(tmp_path, json_line(row(1)) + json_line(row(2)) + json_line(again))
    assert [trajectory.claim[-2] for trajectory in kept] == ["1", "2"]
    assert found(report) == [(3, "duplicate")]
    assert (report.rows_read, report.rows_kept, report.rows_warned, report.rows_refused) == (3, 2, 1, 0)


def test_a_claim_with_two_verdicts_is_kept_twice_and_said(tmp_path: Path) -> None:
    other = row(1, trajectories=STEPS.replace("SUPPORTS", "REFUTES"))
    report, kept = read(tmp_path, json_line(row(1)) + json_line(other))
    assert len(kept) == 2
    assert found(report) == [(2, "conflicting_label")]
    assert report.rows_warned == 1


def test_the_numbers_describe_what_was_kept(tmp_path: Path) -> None:
    content = json_line(row(1)) + json_line(row(2, trajectories=SEEN, label="REFUTES")) + json_line({"claim": "x"})
    report, _ = read(tmp_path, content)
    assert report.labels == {Verdict.SUPPORTS: 1, Verdict.REFUTES: 1, Verdict.NOT_ENOUGH_INFO: 0}
    assert report.steps == {2: 2}
    assert report.actions == {"Finish": 2, "Search": 2}
    assert report.characters["claim"] == TextLengths(shortest=20, median=20, p95=20, longest=20, total=40)
    assert report.characters["thought"].total == len("Look.Yes.Look.")
    assert report.characters["observation"].longest == len("Ada wrote it.")
    assert (report.rows_kept, report.rows_repaired, report.rows_refused) == (2, 1, 1)


def test_lengths_are_exact_order_statistics(tmp_path: Path) -> None:
    claims = ["x" * length for length in (9, 1, 5, 5, 7, 5, 3, 2, 8, 6, 4, 5, 5, 5, 5, 5, 5, 5, 5, 40)]
    rows = (row(claim=claim, trajectories=SEEN, label="SUPPORTS") for claim in claims)
    unique = (json_line(one | {"trajectories": SEEN.replace("Look", f"Look{n}")}) for n, one in enumerate(rows))
    report, _ = read(tmp_path, b"".join(unique))
    assert report.characters["claim"] == TextLengths(shortest=1, median=5, p95=9, longest=40, total=135)


def test_ten_thousand_broken_rows_are_counted_exactly_and_listed_briefly(tmp_path: Path) -> None:
    broken = [b"{\n", b"[1]\n", json_line({"claim": "x"}), json_line(row(1, trajectories="x"))]
    content = json_line(row(1)) + b"".join(broken) * 2_500
    report, _ = read(tmp_path, content)
    assert (report.rows_read, report.rows_kept, report.rows_refused) == (10_001, 1, 10_000)
    assert report.codes == {
        "bad_json": 2_500,
        "missing_trajectory": 2_500,
        "no_steps": 2_500,
        "not_an_object": 2_500,
    }
    assert len(report.findings) == 4 * FINDINGS_PER_CODE
    assert len(report.findings) <= FINDINGS_LIMIT
    assert len(report.findings) + report.findings_left_out == 10_000
    assert {finding.severity for finding in report.findings} == {Severity.REFUSED}


def test_a_file_of_nothing_but_broken_rows_says_what_broke_them(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"none of the 10,000 rows can be kept \(bad_json: 10,000\)") as caught:
        read(tmp_path, b"{\n" * 10_000, "a.jsonl")
    assert caught.value.code == "no_rows_kept"
    assert [problem.loc for problem in caught.value.problems][:2] == [("line", 1), ("line", 2)]
    assert len(caught.value.problems) == 20


def test_a_header_without_rows_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="no rows"):
        read(tmp_path, b"claim,trajectories\n")


def test_rows_without_a_needed_key_are_a_missing_column(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="did you mean 'statement'") as caught:
        read(tmp_path, json_line({"statement": "x", "trajectories": STEPS}) * 2)
    assert caught.value.code == "missing_column"


def test_a_limit_on_rows_names_itself(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="line 4: a dataset has at most 3 rows") as caught:
        read(tmp_path, b"".join(json_line(row(n)) for n in range(5)), rows=3)
    assert caught.value.code == "too_many_rows"


def test_names_of_columns_are_bounded(tmp_path: Path) -> None:
    content = json_line(row(1) | {f"k{n}": n for n in range(5_000)})
    report, _ = read(tmp_path, content)
    assert report.codes["extra_column"] < 200
    assert len(report.findings) == FINDINGS_PER_CODE


@pytest.mark.parametrize("name", ["split", "part"])
def test_a_column_of_parts_is_read_in_every_format(tmp_path: Path, name: str) -> None:
    parts = ["0", "1", "test", ""]
    values = [row(number, **{name: part}) for number, part in enumerate(parts)]
    table = pyarrow.Table.from_pylist(values)
    parquet, written = io.BytesIO(), io.StringIO()
    pyarrow.parquet.write_table(table, parquet)
    csv.DictWriter(written, list(values[0])).writeheader()
    csv.DictWriter(written, list(values[0])).writerows(values)
    lines = b"".join(json_line(value) for value in values)
    for content in (lines, written.getvalue().encode(), parquet.getvalue()):
        report, kept = read(tmp_path, content, columns={"split": name})
        assert [trajectory.split for trajectory in kept] == ["train", "validation", "test", None]
        assert (report.columns["split"], report.codes) == (name, {})
        assert report.splits == {"train": 1, "validation": 1, "test": 1}


def test_a_column_of_that_name_that_means_something_else_costs_no_row(tmp_path: Path) -> None:
    report, kept = read(tmp_path, json_line(row(1, split="labelled_dev")) + json_line(row(2)))
    assert [trajectory.split for trajectory in kept] == [None, None]
    assert (found(report), report.splits, report.rows_warned) == ([(1, "bad_split")], {}, 1)
