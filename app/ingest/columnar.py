"""Parquet, by batches. pyarrow is imported here and nowhere else: only Parquet is worth its start-up time."""

from collections.abc import Iterator
from math import isnan
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from app.domain.datasets import Columns, Finding, SourceRow
from app.domain.errors import InvalidError
from app.ingest.columns import check_header
from app.ingest.lines import Header, Item, not_utf8, too_long

_BATCH = 64
_SHAPES = ("steps", "messages")


def read_parquet(path: Path, columns: Columns, limit: int) -> Iterator[Item]:
    """The column names, then the rows, numbered from 1. Columns that are not read are not touched."""
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            names = tuple(str(name) for name in file.schema_arrow.names)
            header = Header(1, names, check_header(names, columns, _SHAPES))
            yield header
            batches = file.iter_batches(_BATCH, columns=sorted(header.used), use_threads=False)
            for batch in batches:
                for row in range(batch.num_rows):
                    number += 1
                    yield _row(number, batch, row, limit)
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InvalidError(
            f"the Parquet file cannot be read behind row {number:,}: {str(error).splitlines()[0][:200]}; "
            "is it whole? Write it again",
            code="bad_parquet",
        ) from None


def _row(number: int, batch: Any, row: int, limit: int) -> SourceRow | Finding:
    try:
        fields = {name: _plain(batch.column(name)[row].as_py()) for name in batch.schema.names}
    except UnicodeDecodeError:
        return not_utf8(number)
    if sum(len(value) for value in fields.values() if isinstance(value, str)) > limit:
        return too_long(number, limit)
    return SourceRow(number, fields)


def _plain(value: object) -> object:
    """The value as JSON would hold it.

    Bytes become the text that they spell: some writers store texts as binary columns. NaN becomes None: pandas
    writes a missing value so.
    """
    match value:
        case bytes():
            return value.decode()
        case float() if isnan(value):
            return None
        case [*items]:
            return [_plain(item) for item in items]
        case dict():
            return {name: _plain(member) for name, member in value.items()}
    return value
