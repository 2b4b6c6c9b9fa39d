"""Maps a file's column names to the columns that are read."""

from collections.abc import Iterable, Mapping, Sequence

from app.domain.datasets import Columns, RowKind
from app.domain.errors import InvalidError, Problem
from app.domain.spelling import find_correction

_OTHER_WORDS = {
    "claim": ("claim_text", "statement", "query", "question", "text", "input", "sentence"),
    "trajectories": ("trajectory", "trace", "traces", "react", "episode", "output", "completion"),
    "label": ("verdict", "gold", "answer", "gold_label"),
}
_SHOWN = 20


def read_columns(given: Mapping[str, str] | None, kind: RowKind = "trajectories") -> Columns:
    """The column mapping that a user sent. Raises InvalidError `bad_columns`."""
    known = tuple(name for name in Columns.model_fields if name != "kind")
    for key, name in (given or {}).items():
        if key not in known:
            raise InvalidError(
                f"columns maps {', '.join(known)}; {key[:40]!r} is none of them",
                code="bad_columns",
                problems=(Problem(("columns", key), "not a column that is read", f"known: {', '.join(known)}"),),
            )
        if not isinstance(name, str) or not name.strip():
            raise InvalidError(f"{_field(key)} is no column's name", code="bad_columns")
    return Columns(kind=kind, **{key: name.strip() for key, name in (given or {}).items()})


def check_header(names: Sequence[str], columns: Columns, shapes: Iterable[str] = ()) -> frozenset[str]:
    """Returns the column names to read. `shapes`: other columns that may hold steps in this format.

    Raises InvalidError: `missing_column` with the names found and a did-you-mean, `duplicate_column`.
    """
    source: str | None
    if columns.kind == "claims":
        source = columns.label if columns.label in names else None
        role = "label"
    else:
        source = next((name for name in (columns.trajectories, *shapes) if name in names), None)
        role = "trajectories"
    if columns.claim not in names and source != "messages":
        raise missing_column("claim", columns.claim, names)
    if source is None:
        raise missing_column(role, getattr(columns, role), names)
    also = ("evidence",) if shapes else ()
    wanted = (columns.claim, source, columns.label, columns.page, columns.split, *also)
    used = [name for name in dict.fromkeys(wanted) if name in names]
    for name in used:
        if names.count(name) > 1:
            raise InvalidError(
                f"{names.count(name)} columns are called {name[:40]!r}; rename all but one",
                code="duplicate_column",
                problems=(Problem(("file",), f"{name[:40]!r} is repeated in the header"),),
            )
    return frozenset(used)


def _field(role: str) -> str:
    """The form field that maps a column."""
    return f"{role}_column"


def missing_column(role: str, wanted: str, names: Sequence[str]) -> InvalidError:
    """There is no column `wanted` for `role` (claim, trajectories, label) among `names`."""
    shown = ", ".join(repr(name[:40]) for name in names[:_SHOWN]) or "none"
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    message = f"there is no column {wanted[:40]!r}; found: {shown}{more}"
    close = _closest(role, wanted, names)
    hint = f"did you mean {close[:40]!r}? Send {_field(role)}={close[:40]}" if close else None
    hint = hint or f"rename the column that holds the {role} to {wanted[:40]!r}, or name it in {_field(role)}"
    if role == "trajectories" and not close:
        hint += "; for claims with labels and without steps, send kind=claims"
    return InvalidError(
        f"{message}; {hint}", code="missing_column", problems=(Problem((_field(role),), message, hint),)
    )


def _closest(role: str, wanted: str, names: Sequence[str]) -> str | None:
    """The column that another word for `role` names, or a misspelt one. An id of claims is no claim, however alike."""
    by_folded = {name.casefold(): name for name in names}
    known = next((word for word in _OTHER_WORDS.get(role, ()) if word in by_folded), None)
    return by_folded[known] if known else find_correction(wanted, names)
