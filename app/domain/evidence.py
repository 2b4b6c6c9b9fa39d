"""Parses a row's `evidence` into pages and sentence numbers. Datasets write an item in three ways:

    ["Elbe", 0]   {"page": "Elbe", "sentence": 0}   [101, 202, "Elbe", 0]

The last is FEVER's: annotation, evidence, page, sentence. Items may stand in nested lists, as in FEVER's evidence sets.
FEVER's `[101, null, null, null]` and null mean that there is no evidence.
"""

from collections.abc import Iterator

from app.domain.claims import forbidden_character, to_one_line
from app.domain.trajectories import Evidence

_SENTENCE_LIMIT = 1_000_000
_DEEPEST = 4


def read_evidence(value: object) -> tuple[tuple[Evidence, ...], int]:
    """(the evidence, the number of items that cannot be parsed). Never raises.

    A plain text is ignored. Some datasets have a column `evidence` of sentences.
    """
    if value is None or isinstance(value, str):
        return (), 0
    items = list(_items(value, _DEEPEST))
    found = tuple(item for item in items if item is not None)
    return found, len(items) - len(found)


def _items(value: object, depth: int) -> Iterator[Evidence | None]:
    """Yields each item of evidence, and None for one that cannot be parsed."""
    match value:
        case None | [_, _, None, None]:
            return
        case {"page": page, "sentence": sentence} | [str() as page, sentence]:
            yield _evidence(page, sentence)
        case [annotation, evidence, str() as page, sentence] if _is_id(annotation) and _is_id(evidence):
            yield _evidence(page, sentence)
        case [*inner] if depth:
            for item in inner:
                yield from _items(item, depth - 1)
        case _:
            yield None


def _evidence(page: object, sentence: object) -> Evidence | None:
    number = _number(sentence)
    if not isinstance(page, str) or number is None or forbidden_character(page) or not to_one_line(page):
        return None
    return Evidence(page=to_one_line(page), sentence=number)


def _number(value: object) -> int | None:
    """A sentence number from an integer, or from a float or a text that spells one (Parquet and pandas write these)."""
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else None
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _SENTENCE_LIMIT:
        return None
    return value


def _is_id(value: object) -> bool:
    return value is None or isinstance(value, int | float) or (isinstance(value, str) and value.isdecimal())
