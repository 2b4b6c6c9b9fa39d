"""A file → canonical rows and its account, in this process. `app.ingest.child` runs it in one with limits."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from app.domain.datasets import Columns, DatasetReport, Severity
from app.domain.errors import InvalidError, Problem
from app.ingest.account import Account
from app.ingest.columns import missing_column
from app.ingest.formats import open_rows, recognise
from app.ingest.seen import open_seen

_PROBLEMS = 20
_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Upload:
    """A file as it came: where it lies, what it was called, and which of its columns to read."""

    path: Path
    filename: str
    content_type: str | None
    columns: Columns


def write_canonical(upload: Upload, out: Path, *, rows_limit: int, line_bytes: int) -> tuple[DatasetReport, str]:
    """Writes the kept rows to `out` as canonical JSONL; (the report, the SHA-256 of what was written).

    Raises InvalidError when the file as a whole cannot be read or no row of it can be kept.
    """
    found = recognise(upload.path, upload.filename, upload.content_type, upload.columns)
    digest = hashlib.sha256()
    with out.open("wb", buffering=_BUFFER) as sink, open_seen(out.with_suffix(".seen")) as seen:
        account = Account(upload.columns, rows_limit, seen)
        for item in open_rows(found, upload.path, upload.columns, line_bytes):
            line = account.read(item)
            if line is not None:
                digest.update(line)
                sink.write(line)
    report = account.report(found.value)
    if not report.rows_kept:
        raise _nothing_kept(report, account, upload.columns)
    return report, digest.hexdigest()


def _nothing_kept(report: DatasetReport, account: Account, columns: Columns) -> InvalidError:
    names = tuple(account.names)
    for code, role, wanted in (
        ("missing_trajectory", "trajectories", columns.trajectories),
        ("missing_claim", "claim", columns.claim),
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
