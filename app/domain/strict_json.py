"""Parses JSON and refuses an object that names a key twice.

Python's parser keeps the last value of such a key and drops the others in silence.
"""

import json
from collections import Counter
from typing import Any

from app.domain.errors import Loc, Problem

JOINED_FILES = "two files were joined without a line break (a byte order mark stands inside the line)"
_KEY_SHOWN = 60


class RepeatedKeyError(Exception):
    """An object names a key more than once. `loc` is the path to the key from the document's root."""

    def __init__(self, loc: Loc) -> None:
        *parents, key = (str(part)[:_KEY_SHOWN] for part in loc)
        inside = f" in {'.'.join(parents)!r}" if parents else ""
        super().__init__(f"the key {key!r} is repeated{inside}")
        self.loc = loc

    def problem(self) -> Problem:
        return Problem(self.loc, str(self), "keep one of them")


class _RepeatedKey(Exception):
    pass


class _Marked(dict[str, Any]):
    """An object that names `repeated` more than once."""

    repeated: str


def parse_json(text: str) -> Any:
    """The document in `text`. Raises RepeatedKeyError, and whatever `json.loads` raises."""
    try:
        return _STRICT.decode(text)
    except _RepeatedKey:
        raise RepeatedKeyError(_locate(_MARKING.decode(text))) from None


def parse_row(text: str) -> Any:
    """As `parse_json`, with NaN as null: pandas and numpy write a missing value so.

    A JSONDecodeError says so where a second file was joined to the row.
    """
    try:
        return _STRICT_ROW.decode(text)
    except json.JSONDecodeError as error:
        if text[error.pos : error.pos + 1] == "\ufeff":
            raise json.JSONDecodeError(JOINED_FILES, text, error.pos) from None
        raise
    except _RepeatedKey:
        raise RepeatedKeyError(_locate(_MARKING.decode(text))) from None


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RepeatedKey
    return found


def _mark_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    marked = _Marked(pairs)
    if len(marked) == len(pairs):
        return dict(pairs)
    marked.repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
    return marked


def _locate(document: Any) -> Loc:
    """The path to a repeated key. An object that was dropped lies below a key that is repeated itself."""
    stack: list[tuple[Loc, Any]] = [((), document)]
    while stack:
        loc, item = stack.pop()
        if isinstance(item, _Marked):
            return (*loc, item.repeated)
        members = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        stack += [((*loc, key), member) for key, member in members]
    raise AssertionError("no key is repeated")


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


_STRICT = json.JSONDecoder(object_pairs_hook=_refuse_repeated)
_STRICT_ROW = json.JSONDecoder(object_pairs_hook=_refuse_repeated, parse_constant=_constant)
_MARKING = json.JSONDecoder(object_pairs_hook=_mark_repeated)
