"""The application's memory."""

from app.db.session import Database, Unit

__all__ = ["Database", "Unit"]
