"""Uploads of claims with labels only: `kind=claims`."""

import json
from pathlib import Path

import pytest

from app.domain.datasets import DatasetReport
from app.domain.errors import InvalidError
from app.domain.trajectories import ActionName, Evidence, Trajectory
from app.ingest.canonical import Upload, write_canonical
from app.ingest.child import IngestLimits
from app.ingest.columns import read_columns
from tests.ingest.files import found, json_line, read, row

LIMITS = IngestLimits()


def read_claims(
    folder: Path, content: bytes, name: str = "claims.jsonl", **columns: str
) -> tuple[DatasetReport, list[Trajectory]]:
    (folder / "source").write_bytes(content)
    upload = Upload(folder / "source", name, None, read_columns(columns, "claims"))
    report, _ = write_canonical(upload, folder / "out", rows_limit=LIMITS.rows, line_bytes=LIMITS.row_bytes)
    from app.domain.datasets import read_canonical

    return report, [read_canonical(line) for line in (folder / "out").read_bytes().splitlines(keepends=True)]


def test_a_claim_with_its_label_is_a_row(tmp_path: Path) -> None:
    claims = [
        {"claim": "Ada wrote it.", "label": "SUPPORTS", "page": "Ada", "evidence": [["Ada", 0]], "split": "test"},
        {"claim": "Ada sang it.", "label": "not enough info"},
    ]
    report, (first, second) = read_claims(tmp_path, b"".join(map(json_line, claims)))
    assert (report.rows_kept, report.steps) == (2, {1: 2})
    assert (first.page, first.evidence, first.split) == ("Ada", (Evidence(page="Ada", sentence=0),), "test")
    assert first.steps[0].action.name is ActionName.FINISH
    assert (second.verdict, second.page) == ("NOT ENOUGH INFO", None)
    assert found(report) == [(2, "verdict_spelling")]


def test_claims_in_csv_and_under_other_names(tmp_path: Path) -> None:
    content = b"text,gold,title,trajectories\nAda wrote it.,SUPPORTS,Ada,none\n"
    report, (only,) = read_claims(tmp_path, content, "a.csv", claim="text", label="gold", page="title")
    assert (only.claim, only.page, report.rows_kept) == ("Ada wrote it.", "Ada", 1)
    assert found(report) == [(1, "extra_column")]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"claim": "Ada wrote it."}, "no_verdict"),
        ({"claim": "Ada wrote it.", "label": "perhaps"}, "no_verdict"),
        ({"label": "SUPPORTS"}, "missing_claim"),
    ],
)
def test_a_row_without_claim_or_label_is_refused(tmp_path: Path, fields: dict[str, str], code: str) -> None:
    good = json_line({"claim": "Ada sang it.", "label": "REFUTES"})
    report, kept = read_claims(tmp_path, good + json_line(fields))
    assert (len(kept), report.rows_refused, code in report.codes) == (1, 1, True)


def test_the_same_claim_about_another_page_is_another_row(tmp_path: Path) -> None:
    row = {"claim": "Ada wrote it.", "label": "SUPPORTS", "trajectories": "none"}
    rows = [row | {"page": "Ada"}, row | {"page": "Ada Lovelace"}, row | {"page": "Ada"}]
    report, kept = read_claims(tmp_path, b"".join(map(json_line, rows)))
    assert [one.page for one in kept] == ["Ada", "Ada Lovelace"]
    assert report.columns == {"claim": "claim", "label": "label", "page": "page"}
    assert found(report) == [(1, "extra_column"), (3, "duplicate")]


def test_a_control_token_in_a_claim_is_told(tmp_path: Path) -> None:
    report, _ = read_claims(tmp_path, json_line({"claim": "Ada <|im_end|> wrote it.", "label": "SUPPORTS"}))
    assert found(report) == [(1, "control_token_text")]


@pytest.mark.parametrize("page", [7, "a\0b", "Thought 1: Ada", "x" * 301])
def test_a_page_that_is_no_title_is_not_used(tmp_path: Path, page: object) -> None:
    report, (only,) = read_claims(tmp_path, json_line({"claim": "Ada sang it.", "label": "REFUTES", "page": page}))
    assert (only.page, found(report)) == (None, [(1, "bad_page")])


def test_a_file_without_labels_names_the_column(tmp_path: Path) -> None:
    for name, content in (
        ("a.csv", b"claim,verdict\nAda.,SUPPORTS\n"),
        ("a.jsonl", b'{"claim": "A.", "verdict": "b"}'),
    ):
        with pytest.raises(InvalidError, match="did you mean 'verdict'") as refused:
            read_claims(tmp_path, content, name)
        assert refused.value.code == "missing_column"


def test_a_file_without_steps_points_to_the_kind(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="kind=claims"):
        read(tmp_path, b"claim,label\nAda wrote it.,SUPPORTS\n", "a.csv")
    with pytest.raises(InvalidError, match="kind=claims"):
        read(tmp_path, json.dumps({"claim": "Ada wrote it.", "label": "SUPPORTS"}).encode())


def test_a_trajectory_may_name_its_page(tmp_path: Path) -> None:
    _, (only,) = read(tmp_path, json_line(row(page=" Ada  Lovelace ")))
    assert only.page == "Ada Lovelace"
