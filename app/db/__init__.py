"""The database: tables, repositories, and units of work."""

from app.db.session import Database, Unit

__all__ = ["Database", "Unit"]
