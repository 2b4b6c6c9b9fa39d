"""Cursor paging, newest first: ids sort by the time they were made."""

from typing import Any, TypeVar

from sqlalchemy import Select, SQLColumnExpression, select
from sqlalchemy.orm import Session

Row = TypeVar("Row")
Wanted = TypeVar("Wanted", bound=Select[Any])


def page_after(wanted: Wanted, key: SQLColumnExpression[str], after: str | None, limit: int) -> Wanted:
    """One page of `wanted` after the cursor `after`, and one row more, which shows whether more follow."""
    page = wanted.order_by(key.desc()).limit(limit + 1)
    return page if after is None else page.where(key < after)


def list_newest_first(
    session: Session, table: type[Row], key: SQLColumnExpression[str], after: str | None, limit: int
) -> tuple[list[Row], bool]:
    """(rows after the cursor `after`, whether more follow)."""
    rows = list(session.scalars(page_after(select(table), key, after, limit)))
    return rows[:limit], len(rows) > limit
