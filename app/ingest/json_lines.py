"""Reads JSON Lines, and makes findings of lines that are not JSON objects."""

import json
from collections.abc import Iterator
from pathlib import Path

from app.domain.datasets import Finding, SourceRow, build_finding
from app.domain.strict_json import RepeatedKeyError, parse_row
from app.ingest.lines import Item, not_utf8, numbered_lines, too_long


def read_json_lines(path: Path, limit: int) -> Iterator[Item]:
    """Yields a row for each line that is not blank."""
    with path.open("rb") as stream:
        for number, line in numbered_lines(stream, limit):
            if line is None:
                yield too_long(number, limit)
            elif not line.isspace():
                yield json_row(number, line)


def json_row(line: int, raw: bytes) -> SourceRow | Finding:
    """The object in `raw`, or a finding. Deep nesting and huge numbers are findings too."""
    try:
        value = parse_row(raw.decode())
    except UnicodeDecodeError:
        return not_utf8(line)
    except RepeatedKeyError as error:
        return build_finding(line, "repeated_key", f"{error}; keep one of them")
    except json.JSONDecodeError as error:
        return build_finding(line, "bad_json", f"the row is not JSON: {error.msg} at its character {error.pos + 1:,}")
    except RecursionError:
        return build_finding(line, "bad_json", "the row is nested too deeply; a row is an object of texts and lists")
    except ValueError:
        return build_finding(line, "bad_json", "the row holds a number with too many digits")
    if not isinstance(value, dict):
        return build_finding(line, "not_an_object", 'the row is JSON, but not an object; write {"claim": …, …}')
    return SourceRow(line, value)
