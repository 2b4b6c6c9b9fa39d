"""Blobs are stored before the row that refers to them. If that row is not committed, they are deleted again."""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from app.db import Database
from app.domain.errors import VerituneError
from app.storage import Blobs, StagedBlobs

log = structlog.get_logger(__name__)


@contextmanager
def staged(database: Database, blobs: Blobs) -> Iterator[StagedBlobs]:
    """Store blobs and commit their row within the block. If the block raises, no new blob stays without a row."""
    new = blobs.staged()
    try:
        yield new
    except BaseException:
        discard_unreferenced(database, blobs, new.created)
        raise
    new.put_missing()


def discard_unreferenced(database: Database, blobs: Blobs, digests: set[str]) -> None:
    """Delete those blobs to which no row refers. A fault is logged only: it costs room and no data."""
    try:
        with database.read() as unit:
            orphans = unit.blob_references.unreferenced(digests)
    except VerituneError as error:
        log.warning("orphan_blobs_left", blobs=sorted(digests), reason=error.detail)
    else:
        blobs.discard(orphans)
