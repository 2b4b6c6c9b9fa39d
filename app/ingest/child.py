"""Reads an upload in a child process, so that a bad file cannot exhaust or crash the API process.

    parent ── order (JSON on stdin) ──► python -m app.ingest ── canonical.jsonl, result.json ──► parent

The child sets its own resource limits before it opens the file. When it ends early, the parent raises an error that
names the limit and deletes the working directory.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.domain.datasets import DatasetReport, RowKind
from app.domain.errors import InvalidError, Problem
from app.ingest.columns import read_columns

_ROOT = Path(__file__).resolve().parents[2]
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
_STDERR_SHOWN = 2_000

CANONICAL = "canonical.jsonl"
RESULT = "result.json"


@dataclass(frozen=True, slots=True)
class IngestLimits:
    """Resource limits for reading one upload."""

    memory_bytes: int = 2 << 30
    cpu_seconds: int = 600
    wall_seconds: float = 900.0
    rows: int = 1_000_000
    row_bytes: int = 1 << 20
    output_bytes: int = 4 << 30


@dataclass(frozen=True, slots=True)
class IngestResult:
    """A dataset that was read. `canonical` is in the caller's folder; its file name is its digest."""

    report: DatasetReport
    canonical: Path
    digest: str
    rows: int


def ingest(
    path: Path,
    filename: str,
    content_type: str | None,
    out_dir: Path,
    *,
    columns: Mapping[str, str] | None = None,
    kind: RowKind = "trajectories",
    limits: IngestLimits | None = None,
) -> IngestResult:
    """Reads the file at `path` into `out_dir/<digest>.jsonl`. `filename` is the sender's name for it.

    `columns` maps claim, trajectories, label, page and split to the own column names of the file, whose rows are of
    `kind`. Raises InvalidError when the
    file is bad or exceeds a limit, and RuntimeError when the reader itself fails.
    """
    limits = limits or IngestLimits()
    read_columns(columns, kind)
    work = Path(tempfile.mkdtemp(prefix=".ingest-", dir=out_dir))
    try:
        order = {
            "path": str(path.resolve()),
            "filename": filename,
            "content_type": content_type,
            "columns": dict(columns or {}),
            "kind": kind,
            "limits": asdict(limits),
        }
        return _collect(_run(order, work, limits), work, out_dir)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(order: dict[str, Any], work: Path, limits: IngestLimits) -> dict[str, Any]:
    with (work / "stderr").open("wb") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "app.ingest"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            cwd=work,
            env=_environment(),
            start_new_session=True,
        )
        try:
            child.communicate(json.dumps(order).encode(), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            raise _too_slow(f"{limits.wall_seconds:g} seconds") from None
        finally:
            child.kill()
            child.wait()
    if child.returncode:
        raise _exit_error(child.returncode, work, limits)
    return dict(json.loads((work / RESULT).read_bytes()))


def _environment() -> dict[str, str]:
    """The child's environment variables. It gets none of the deployment's secrets."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {
        **passed,
        "PYTHONPATH": str(_ROOT),
        "PYTHONUTF8": "1",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "OMP_NUM_THREADS": "1",
    }


def _exit_error(code: int, work: Path, limits: IngestLimits) -> Exception:
    if code == -signal.SIGXCPU:
        return _too_slow(f"{limits.cpu_seconds} seconds of processor time")
    if code < 0:
        return InvalidError(
            f"the process that read the file died (signal {-code}): the file is broken or needs too much memory; "
            "send it as JSONL, in smaller files",
            code="reader_died",
        )
    tail = (work / "stderr").read_bytes()[-_STDERR_SHOWN:].decode(errors="replace")
    return RuntimeError(f"the reader of uploads failed with status {code}: {tail}")


def _too_slow(limit: str) -> InvalidError:
    return InvalidError(f"reading the file took more than {limit}; send it in smaller files", code="too_slow")


def _collect(result: dict[str, Any], work: Path, out_dir: Path) -> IngestResult:
    if error := result.get("error"):
        problems = tuple(Problem(tuple(p["loc"]), p["message"], p["hint"]) for p in error["problems"])
        raise InvalidError(error["detail"], code=error["code"], problems=problems)
    report = DatasetReport.model_validate(result["report"])
    canonical = out_dir / f"{result['digest']}.jsonl"
    (work / CANONICAL).replace(canonical)
    return IngestResult(report, canonical, result["digest"], report.rows_kept)
