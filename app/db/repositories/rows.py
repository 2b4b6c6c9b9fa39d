"""Reading and writing one row so that both databases behave alike when several do it at once."""

from typing import Any, TypeVar

from sqlalchemy import Select, inspect
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.db.base import Base

Row = TypeVar("Row")
WRITES = "veritune_write"
"""The execution option that tells a writing unit's connection from a reading one's."""


def first(session: Session, wanted: Select[Row]) -> Row | None:
    """The first row of `wanted`. In a writing unit it is held until the unit ends.

    SQLite lets one writer in at a time; on Postgres what was read could be out of date by the time it is changed.
    """
    if session.get_bind().get_execution_options().get(WRITES):
        wanted = wanted.with_for_update()
    return session.scalars(wanted.execution_options(populate_existing=True)).first()


def insert_into(session: Session, table: type[Base]) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that can say what is done on a conflict, in the words of the session's database."""
    return sqlite.insert(table) if session.get_bind().dialect.name == "sqlite" else postgresql.insert(table)


def put(session: Session, row: Base) -> None:
    """Insert the row, or replace the one that has its key.

    One statement: of two that look first and insert then, one would fail on Postgres.
    """
    table = inspect(type(row))
    values: dict[str, Any] = {column.key: getattr(row, column.key) for column in table.column_attrs}
    keys = [column.name for column in table.primary_key]
    statement = insert_into(session, type(row)).values(values)
    replaced = {name: statement.excluded[name] for name in values if name not in keys}
    settled = statement.on_conflict_do_update(index_elements=keys, set_=replaced).returning(type(row))
    session.scalars(settled, execution_options={"populate_existing": True}).one()
