"""Uploads a small and a large JSONL file: rows per second, and the memory of the API and of its ingest child."""

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.deployment import Deployment
from benchmarks.machine import MIB, watched
from benchmarks.rows import write_rows

MB = 1_000_000


def uploading(deployment: Deployment, directory: Path, sizes_mb: tuple[int, ...]) -> list[dict[str, Any]]:
    return [_one(deployment, directory / f"rows-{size}.jsonl", size) for size in sizes_mb]


def _one(deployment: Deployment, path: Path, size_mb: int) -> dict[str, Any]:
    rows = write_rows(path, size_mb * MB)
    try:
        size = path.stat().st_size
        plain = _read_plainly(path)
        with watched(deployment.pid("app.cli", "api"), "app.ingest") as memory, path.open("rb") as file:
            began, began_at = time.perf_counter(), time.time()
            made = deployment.post("/datasets", files={"file": (path.name, file, "application/jsonl")})
            took, ended_at = time.perf_counter() - began, time.time()
    finally:
        path.unlink()
    deployment.client.delete(f"/datasets/{made['id']}").raise_for_status()
    return {
        "file_mb": round(size / MB, 1),
        "rows": rows,
        "rows_kept": made["report"]["rows_kept"],
        "seconds": round(took, 2),
        "mb_per_second": round(size / MB / took, 2),
        "receiving_seconds": round((memory.child_began or ended_at) - began_at, 2),
        "reading_seconds": round((memory.child_ended or ended_at) - (memory.child_began or ended_at), 2),
        "storing_seconds": round(ended_at - (memory.child_ended or ended_at), 2),
        "json_loads_seconds": round(plain, 2),
        "api_before_mib": round(memory.before / MIB, 1),
        "api_peak_mib": round(memory.peak / MIB, 1),
        "child_peak_mib": round(memory.child_peak / MIB, 1),
    }


def _read_plainly(path: Path) -> float:
    """The limit: the time that Python takes to read and parse each line."""
    began = time.perf_counter()
    with path.open("rb") as file:
        for line in file:
            json.loads(line)
    return time.perf_counter() - began
