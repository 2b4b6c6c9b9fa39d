"""The `veritune` commands. They start processes and call services, and contain no logic of their own."""

from app.cli.commands import application


def main() -> None:
    application()


__all__ = ["application", "main"]
