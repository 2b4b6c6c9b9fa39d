"""Bringing a database to the tables that this version needs."""

from importlib.resources import files

from alembic import command
from alembic.config import Config


def migration_config(url: str) -> Config:
    """Alembic's configuration for the database at `url`."""
    config = Config()
    config.set_main_option("script_location", str(files("migrations")))
    config.attributes["url"] = url
    return config


def migrate(url: str) -> None:
    """Upgrade to the newest revision; does nothing when it is there already."""
    command.upgrade(migration_config(url), "head")
