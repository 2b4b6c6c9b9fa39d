"""Writes the canonical rows of an uploaded file and makes its report.

This runs in the calling process. `app.ingest.child` runs it in a child process with limits.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from app.domain.datasets import Columns, DatasetReport, Severity
from app.domain.errors import InvalidError, Problem
from app.ingest.columns import missing_column
from app.ingest.duplicates import open_duplicate_index
from app.ingest.formats import detect_format, open_rows
from app.ingest.report_builder import DatasetReportBuilder

_PROBLEMS = 20
_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Upload:
    """An uploaded file: its path, the name that its sender gave it, and which of its columns to read."""

    path: Path
    filename: str
    content_type: str | None
    columns: Columns


def write_canonical(upload: Upload, out: Path, *, rows_limit: int, line_bytes: int) -> tuple[DatasetReport, str]:
    """Writes the kept rows to `out` as canonical JSONL. Returns (the report, the SHA-256 of `out`).

    Raises InvalidError when the file as a whole cannot be read or no row of it can be kept.
    """
    found = detect_format(upload.path, upload.filename, upload.content_type, upload.columns)
    digest = hashlib.sha256()
    with out.open("wb", buffering=_BUFFER) as sink, open_duplicate_index(out.with_suffix(".duplicates")) as duplicates:
        builder = DatasetReportBuilder(upload.columns, rows_limit, duplicates)
        for item in open_rows(found, upload.path, upload.columns, line_bytes):
            line = builder.add(item)
            if line is not None:
                digest.update(line)
                sink.write(line)
    report = builder.build(found.value)
    if not report.rows_kept:
        raise _nothing_kept(report, builder, upload.columns)
    return report, digest.hexdigest()


def _nothing_kept(report: DatasetReport, builder: DatasetReportBuilder, columns: Columns) -> InvalidError:
    names = tuple(builder.names)
    for code, role, wanted in (
        ("missing_trajectory", "trajectories", columns.trajectories),
        ("missing_claim", "claim", columns.claim),
        *([("no_verdict", "label", columns.label)] if columns.kind == "claims" else []),
    ):
        if names and report.codes.get(code) == report.rows_read and wanted not in names:
            return missing_column(role, wanted, names)
    if report.rows_read and report.codes.get("bad_utf8") == report.rows_read:
        return InvalidError("no row of the file is UTF-8; save the file as UTF-8", code="not_utf8")
    refused = [found for found in report.findings if found.severity is Severity.REFUSED][:_PROBLEMS]
    problems = tuple(Problem(("line", found.line), found.message, found.code) for found in refused)
    return InvalidError(_summary(report), code="no_rows_kept", problems=problems)


def _summary(report: DatasetReport) -> str:
    if not report.rows_read:
        return "the file holds no rows; send at least one"
    counts = ", ".join(f"{code}: {count:,}" for code, count in report.codes.items())
    return f"none of the {report.rows_read:,} rows can be kept ({counts}); one is enough for a dataset"
