"""Cursor paging, newest first: ids sort by the time they were made."""

from typing import Any, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.orm import InstrumentedAttribute, Session

Row = TypeVar("Row")


def newest(
    session: Session,
    table: type[Row],
    key: InstrumentedAttribute[str],
    after: str | None,
    limit: int,
    *conditions: Any,
) -> tuple[list[Row], bool]:
    """(rows behind the cursor `after`, whether more follow)."""
    wanted: Select[Row] = select(table).order_by(key.desc()).limit(limit + 1)
    for condition in conditions:
        wanted = wanted.where(condition)
    if after is not None:
        wanted = wanted.where(key < after)
    rows = list(session.scalars(wanted))
    return rows[:limit], len(rows) > limit
