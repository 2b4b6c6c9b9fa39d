"""What a command may end with."""


class CommandError(Exception):
    """Why a command cannot go on, and the way out, in words for the operator. Told as one line, with status 1."""
