"""Parquet: texts, nested steps, binary columns, and files that are not whole."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from app.domain.datasets import DatasetReport
from app.domain.errors import InvalidError
from app.domain.trajectories import Trajectory
from tests.ingest.files import STEPS, found, json_line, read, row


def parquet(table: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return bytes(sink.getvalue())


def rows(folder: Path, *rows: dict[str, object], row_bytes: int = 1 << 20) -> tuple[DatasetReport, list[Trajectory]]:
    return read(folder, parquet(pyarrow.Table.from_pylist(list(rows))), "upload", row_bytes=row_bytes)


def test_rows_are_read_and_numbered_from_one(tmp_path: Path) -> None:
    many = [row(number) for number in range(1, 200)]
    report, kept = rows(tmp_path, *many, row(200, trajectories="nothing"))
    assert (report.format, report.rows_kept) == ("parquet", 199)
    assert found(report) == [(200, "no_steps")]
    assert kept[150].claim == "Ada wrote program 151."


def test_nested_steps_and_evidence_are_read(tmp_path: Path) -> None:
    steps = [
        {"thought": "Look.", "action": "Search[Ada]", "observation": "It."},
        {"thought": "", "action": "Finish[SUPPORTS]", "observation": None},
    ]
    evidence = [{"page": "Ada", "sentence": 3}]
    report, kept = rows(tmp_path, {"claim": "One.", "steps": steps, "evidence": evidence, "other": [{"a": [1]}]})
    assert str(kept[0].steps[0].action) == "Search[Ada]"
    assert kept[0].evidence[0].sentence == 3
    assert report.columns["trajectories"] == "steps"
    assert report.codes == {"extra_column": 1}


def test_a_chat_is_read_without_a_claim_column(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "One."}, {"role": "assistant", "content": STEPS}]
    assert rows(tmp_path, {"messages": messages})[1][0].claim == "One."


def test_texts_stored_as_bytes_are_texts(tmp_path: Path) -> None:
    report, kept = rows(
        tmp_path,
        {"claim": b"One.", "trajectories": STEPS.encode()},
        {"claim": b"caf\xe9", "trajectories": STEPS.encode()},
    )
    assert kept[0].claim == "One."
    assert found(report) == [(2, "bad_utf8")]


def test_optional_columns_of_other_types_cost_no_row(tmp_path: Path) -> None:
    nested = {"evidence": [[["101", "202", "Elbe", "0"]]], "split": [["train"]]}
    report, kept = rows(tmp_path, row(1, label=2**62, **nested), row(2, label=1, **nested))
    assert (report.rows_kept, report.codes) == (2, {"bad_label": 2, "bad_split": 2})
    assert [(item.page, item.sentence) for item in kept[0].evidence] == [("Elbe", 0)]


def test_nan_is_no_value_wherever_it_stands(tmp_path: Path) -> None:
    nan = float("nan")
    table = pyarrow.table(
        {
            "claim": ["One.", "Two."],
            "trajectories": [STEPS, STEPS],
            "label": pyarrow.array([nan, nan], pyarrow.float64()),
            "split": pyarrow.array([nan, 1.0], pyarrow.float64()),
            "evidence": pyarrow.array([[[nan]], [[]]], pyarrow.list_(pyarrow.list_(pyarrow.float64()))),
        }
    )
    report, kept = read(tmp_path, parquet(table))
    assert (report.rows_kept, report.codes) == (2, {})
    assert [trajectory.split for trajectory in kept] == [None, "validation"]
    lines = b'{"claim": "One.", "label": NaN, "evidence": NaN, "split": NaN, "trajectories": ' + json_line(STEPS)
    assert read(tmp_path, lines.strip() + b"}")[0].codes == {}


def test_texts_stored_as_bytes_are_texts_inside_lists_too(tmp_path: Path) -> None:
    steps = [
        {"thought": b"Look.", "action": b"Search[Ada]", "observation": b"It."},
        {"thought": b"", "action": b"Finish[SUPPORTS]", "observation": None},
    ]
    report, kept = rows(tmp_path, {"claim": "One.", "steps": steps}, {"claim": "Two.", "steps": [{"thought": b"\xe9"}]})
    assert str(kept[0].steps[0].action) == "Search[Ada]"
    assert found(report) == [(2, "bad_utf8")]


def test_a_row_that_is_too_long_is_refused(tmp_path: Path) -> None:
    report, _ = rows(tmp_path, row(1), row(2, claim="x" * 5_000), row_bytes=2_000)
    assert found(report) == [(2, "line_too_long")]


@pytest.mark.parametrize(
    "long",
    [
        {"claim": "é" * 1_100},
        {"trajectories": b"x" * 2_100},
        {"steps": [{"thought": "x" * 700, "action": "y" * 700, "observation": "z" * 700}]},
        {"messages": [{"role": "user", "content": "x" * 300} for _ in range(7)]},
        {"evidence": [["x" * 2_100, "1"]]},
        {"not_read": "x" * 2_100},
        {"not_read": [{"deep": [["x" * 2_100]]}]},
        {"not_read": list(range(300))},
    ],
    ids=lambda long: "-".join(long),
)
def test_a_row_that_is_too_long_as_json_is_too_long_here(tmp_path: Path, long: dict[str, object]) -> None:
    pairs = [dict.fromkeys(long) | row(1), row(2) | long]
    if "trajectories" in long:
        pairs[0]["trajectories"] = STEPS.encode()
    report, kept = rows(tmp_path, *pairs, row_bytes=2_000)
    assert [(one.line, one.code) for one in report.findings if one.severity == "refused"] == [(2, "line_too_long")]
    assert len(kept) == 1


def test_a_row_does_not_answer_for_the_texts_of_others(tmp_path: Path) -> None:
    """A dictionary-encoded column holds each text once for all rows."""
    table = pyarrow.Table.from_pylist([row(number, note="x" * 900 + str(number)) for number in range(10)])
    at = table.schema.get_field_index("note")
    table = table.set_column(at, "note", table.column("note").dictionary_encode())
    report, _ = read(tmp_path, parquet(table), row_bytes=2_000)
    assert report.rows_kept == 10


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="did you mean 'Trajectories'") as caught:
        rows(tmp_path, {"claim": "One.", "Trajectories": STEPS})
    assert caught.value.code == "missing_column"


@pytest.mark.parametrize("keep", [4, 100, -1, -9])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    content = parquet(pyarrow.Table.from_pylist([row(number) for number in range(50)]))
    with pytest.raises(InvalidError, match="it may be incomplete") as caught:
        read(tmp_path, content[:keep])
    assert caught.value.code == "bad_parquet"


def test_a_file_with_a_broken_page_is_refused_whole(tmp_path: Path) -> None:
    content = bytearray(parquet(pyarrow.Table.from_pylist([row(number) for number in range(500)])))
    content[4:400] = bytes(396)
    with pytest.raises(InvalidError, match="Parquet file cannot be read"):
        read(tmp_path, bytes(content))
