"""The child process that reads one upload.

It takes an order on stdin and writes `canonical.jsonl` and `result.json` to its working directory.
"""

import errno
import json
import resource
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.domain.errors import InvalidError
from app.ingest.canonical import Upload, write_canonical
from app.ingest.child import CANONICAL, RESULT, IngestLimits
from app.ingest.columns import read_columns


def main() -> None:
    order = json.load(sys.stdin)
    limits = IngestLimits(**order["limits"])
    _limit_self(limits)
    Path(RESULT).write_text(json.dumps(_result(order, limits)))


def _limit_self(limits: IngestLimits) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.output_bytes, limits.output_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(int(limits.wall_seconds) + 2)  # ends this process if the parent died


def _result(order: dict[str, Any], limits: IngestLimits) -> dict[str, Any]:
    columns = read_columns(order["columns"], order["kind"])
    upload = Upload(Path(order["path"]), order["filename"], order["content_type"], columns)
    try:
        report, digest = write_canonical(upload, Path(CANONICAL), rows_limit=limits.rows, line_bytes=limits.row_bytes)
    except InvalidError as error:
        return _error(error)
    except MemoryError:
        return _error(_too_large(f"more than {limits.memory_bytes >> 20:,} MiB of memory", "too_much_memory"))
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        return _error(_too_large(f"more than {limits.output_bytes >> 20:,} MiB on disk", "too_large"))
    return {"report": report.model_dump(mode="json"), "digest": digest}


def _too_large(what: str, code: str) -> InvalidError:
    return InvalidError(f"reading the file takes {what}; send it in smaller files", code=code)


def _error(error: InvalidError) -> dict[str, Any]:
    problems = [asdict(problem) for problem in error.problems]
    return {"error": {"code": error.code, "detail": error.detail, "problems": problems}}


if __name__ == "__main__":
    main()
