"""Uploads written for a test, and reading them in this process."""

import json
from pathlib import Path

from app.domain.datasets import Columns, DatasetReport, read_canonical
from app.domain.trajectories import Trajectory
from app.ingest.canonical import Upload, write_canonical
from app.ingest.child import IngestLimits
from app.ingest.columns import read_columns

SEEN = "Thought 1: Look.\nAction 1: Search[Ada]\nObservation 1: Ada wrote it.\n"
STEPS = SEEN + "Thought 2: Yes.\nAction 2: Finish[SUPPORTS]"


def row(number: int = 1, **fields: object) -> dict[str, object]:
    return {"claim": f"Ada wrote program {number}.", "trajectories": STEPS, **fields}


def json_line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def read(
    folder: Path,
    content: bytes,
    name: str = "upload",
    content_type: str | None = None,
    columns: dict[str, str] | None = None,
    **limits: int,
) -> tuple[DatasetReport, list[Trajectory]]:
    """(the report, the trajectories kept) of an upload with this content."""
    source, out = folder / "source", folder / "canonical"
    source.write_bytes(content)
    wanted: Columns = read_columns(columns)
    usual = IngestLimits()
    report, _ = write_canonical(
        Upload(source, name, content_type, wanted),
        out,
        rows_limit=limits.get("rows", usual.rows),
        line_bytes=limits.get("row_bytes", usual.row_bytes),
    )
    return report, [read_canonical(line) for line in out.read_bytes().splitlines(keepends=True)]


def found(report: DatasetReport) -> list[tuple[int, str]]:
    """(line, code) of each finding listed."""
    return [(finding.line, finding.code) for finding in report.findings]
