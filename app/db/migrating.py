"""Migrates a database to the tables of this version."""

from importlib.resources import files

from alembic import command
from alembic.config import Config
from sqlalchemy.exc import DatabaseError

from app.domain.errors import UnavailableError


def migration_config(url: str) -> Config:
    """Alembic's configuration for the database at `url`."""
    config = Config()
    config.set_main_option("script_location", str(files("migrations")))
    config.attributes["url"] = url
    return config


def migrate(url: str) -> None:
    """Upgrade to the newest revision. Does nothing if the database has it. Raises UnavailableError."""
    try:
        command.upgrade(migration_config(url), "head")
    except DatabaseError as error:  # also if it is no database, or this user may not change it
        reason = str(error.orig).strip().splitlines()[0]
        raise UnavailableError(f"the database cannot be used: {reason}", code="database_away") from error
