"""veritune: the commands. They start processes and call services; they hold no logic of their own."""

from app.cli.commands import application


def main() -> None:
    application()


__all__ = ["application", "main"]
