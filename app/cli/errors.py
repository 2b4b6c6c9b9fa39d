"""The error that ends a command."""


class CommandError(Exception):
    """A command cannot continue. The message says why and what to do; it is printed as one line, with status 1."""
