"""Alembic's environment: the application's tables and its database URL."""

from typing import Literal

from alembic import context
from sqlalchemy import text

from app.db import Database, tables
from app.db.base import Base, Instant
from app.settings import Settings

ONE_AT_A_TIME = 7_041_776
"""Key of the Postgres advisory lock that serialises concurrent migrations."""


def _render(kind: str, item: object, _context: object) -> str | Literal[False]:
    """Renders our column types as database types, so that old migrations do not depend on our classes."""
    return "sa.Double()" if kind == "type" and isinstance(item, Instant) else False


def run() -> None:
    assert tables.JobRow.metadata is Base.metadata
    database = Database(context.config.attributes.get("url") or Settings().database)
    try:
        with database.engine.connect() as connection:
            context.configure(
                connection=connection,
                target_metadata=Base.metadata,
                render_as_batch=connection.dialect.name == "sqlite",
                render_item=_render,
            )
            with context.begin_transaction():
                if connection.dialect.name == "postgresql":  # SQLite allows only one writer
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({ONE_AT_A_TIME})"))
                context.run_migrations()
    finally:
        database.close()


run()
