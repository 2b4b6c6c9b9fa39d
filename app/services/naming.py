"""Names of uploads, and the file names that clients send."""

import re
from collections.abc import Callable

from app.domain.claims import to_one_line
from app.domain.errors import ConflictError, InvalidError, Problem
from app.domain.identity import looks_like_id
from app.domain.spec_base import NAME_PATTERN

LONGEST_FILENAME = 255


def check_name(asked: str | None) -> None:
    """Raise InvalidError for an invalid name."""
    if asked is None or (re.fullmatch(NAME_PATTERN, asked) and not looks_like_id(asked)):
        return
    message = "a name has 1 to 100 letters, digits, dots, dashes or underscores and begins with a letter or digit"
    if looks_like_id(asked):
        message = "a name is not spelled like an id; choose another one"
    raise InvalidError(f"name: {message}", code="bad_name", problems=(Problem(("name",), message),))


def taken_by_another(asked: str, name: str, identity: str, what: str) -> ConflictError:
    """The error for an upload that exists already, under a name that another one has."""
    message = f"another {what} is named {asked!r}, and this is the {what} {name!r} ({identity}) already; refer to it so"
    return ConflictError(message, code="name_taken", problems=(Problem(("name",), message),))


def shown_filename(given: str) -> str:
    """The last component of a client's file name, printable and not too long. It is only shown, never opened."""
    last = re.split(r"[/\\]", given)[-1]
    return to_one_line("".join(c for c in last if c.isprintable()))[:LONGEST_FILENAME] or "upload"


def choose_name(asked: str | None, filename: str, taken: Callable[[str], bool], what: str) -> str:
    """The requested name, or a free one made from the file name. Raises ConflictError if `asked` is taken."""
    if asked is not None:
        if taken(asked):
            raise ConflictError(f"there is a {what} named {asked!r} already; choose another name", code="name_taken")
        return asked
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", filename.rsplit(".", 1)[0]).strip("-._")[:80]
    return free_name(stem or what, taken)


def free_name(stem: str, taken: Callable[[str], bool]) -> str:
    """The stem; with a number appended if it is taken or spelled like an id."""
    number = 1
    name = stem
    while taken(name) or looks_like_id(name):
        number += 1
        name = f"{stem}-{number}"
    return name
