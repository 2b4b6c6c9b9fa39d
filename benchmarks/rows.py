"""A JSONL of valid rows, as large as asked for: the examples' own, each claim told apart by a number."""

import json
from itertools import count
from pathlib import Path

from benchmarks.machine import ROOT

EXAMPLES = ROOT / "examples" / "train.jsonl"


def write_rows(path: Path, size: int) -> int:
    """At least `size` bytes of rows, no two alike. How many rows."""
    examples = [json.loads(line) for line in EXAMPLES.read_text("utf-8").splitlines()]
    parts = []
    for row in examples:
        claim, rest = row.pop("claim"), json.dumps(row)[1:]
        parts.append((json.dumps(claim)[:-1], rest))
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for number in count():
            if written >= size:
                return number
            claim, rest = parts[number % len(parts)]
            written += file.write(f'{{"claim": {claim} (no. {number})", {rest}\n')
    raise AssertionError("unreachable")
