"""Read and write one row, with the same behaviour on both databases under concurrency."""

from typing import Any, TypeVar

from sqlalchemy import Select, inspect
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.db.base import Base

Row = TypeVar("Row")
WRITES = "veritune_write"
"""The execution option that marks the connection of a writing unit."""


def first(session: Session, wanted: Select[Row]) -> Row | None:
    """The first row of `wanted`. A writing unit locks it until it ends.

    SQLite has one writer at a time. On Postgres, an unlocked row could change between read and write.
    """
    if session.get_bind().get_execution_options().get(WRITES):
        wanted = wanted.with_for_update()
    return session.scalars(wanted.execution_options(populate_existing=True)).first()


def insert_into(session: Session, table: type[Base]) -> sqlite.Insert | postgresql.Insert:
    """An INSERT with ON CONFLICT, in the dialect of the session's database."""
    return sqlite.insert(table) if session.get_bind().dialect.name == "sqlite" else postgresql.insert(table)


def put(session: Session, row: Base) -> None:
    """Insert the row, or replace the row with its key.

    It is one statement: of two concurrent transactions that select and then insert, one would fail on Postgres.
    """
    table = inspect(type(row))
    values: dict[str, Any] = {column.key: getattr(row, column.key) for column in table.column_attrs}
    keys = [column.name for column in table.primary_key]
    statement = insert_into(session, type(row)).values(values)
    replaced = {name: statement.excluded[name] for name in values if name not in keys}
    settled = statement.on_conflict_do_update(index_elements=keys, set_=replaced).returning(type(row))
    session.scalars(settled, execution_options={"populate_existing": True}).one()
