"""Names for what was uploaded without one."""

import re
from collections.abc import Callable
from pathlib import PurePath

from app.domain.errors import ConflictError, InvalidError
from app.domain.specs import NAME_PATTERN


def choose_name(asked: str | None, filename: str, taken: Callable[[str], bool], what: str) -> str:
    """The name asked for, checked; or one made from the file's, with a number behind it where that is taken."""
    if asked is not None:
        if not re.fullmatch(NAME_PATTERN, asked):
            raise InvalidError(
                "a name has 1 to 100 letters, digits, dots, dashes or underscores and begins with a letter or digit",
                code="bad_name",
            )
        if taken(asked):
            raise ConflictError(f"there is a {what} named {asked!r} already", code="name_taken")
        return asked
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(filename).stem).strip("-._")[:80] or what
    number = 1
    name = stem
    while taken(name):
        number += 1
        name = f"{stem}-{number}"
    return name
