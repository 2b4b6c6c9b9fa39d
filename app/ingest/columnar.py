"""Reads Parquet in batches. pyarrow starts slowly, so only this module imports it."""

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

_BATCH_ROWS = 64
_BATCH_BYTES = 16 << 20
_SHAPES = ("steps", "messages")


def read_parquet(path: Path, columns: Columns, limit: int) -> Iterator[Item]:
    """Yields the column names, then the rows, numbered from 1.

    All columns are read, because the limit is on the whole row, as it is in a line of JSON or CSV.
    """
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            names = tuple(str(name) for name in file.schema_arrow.names)
            header = Header(1, names, check_header(names, columns, _SHAPES))
            yield header
            for batch in file.iter_batches(_rows_at_once(file.metadata), use_threads=False):
                for row in range(batch.num_rows):
                    number += 1
                    yield _row(number, batch.slice(row, 1), header.used, limit)
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, RecursionError) as error:
        raise InvalidError(
            f"the Parquet file cannot be read after row {number:,}: {str(error).splitlines()[0][:200]}; "
            "it may be incomplete; write it again",
            code="bad_parquet",
        ) from None


def _rows_at_once(metadata: Any) -> int:
    """So many rows that a batch of them takes about `_BATCH_BYTES`."""
    total: int = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    rows: int = metadata.num_rows
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, total)))


def _row(number: int, row: Any, used: frozenset[str], limit: int) -> SourceRow | Finding:
    """`row`: a batch of one."""
    if _size(row) > limit:
        return too_long(number, limit)
    try:
        return SourceRow(number, {name: _plain(row.column(name)[0].as_py()) for name in used})
    except UnicodeDecodeError:
        return not_utf8(number)


def _size(row: Any) -> int:
    """Bytes of the row's values, nested ones included. A dictionary-encoded column counts as the text of this row."""
    columns = (
        column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column for column in row.columns
    )
    return sum(column.nbytes for column in columns)


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
