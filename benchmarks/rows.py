"""Writes a JSONL file of a given size from the examples' rows. A number makes each claim distinct."""

import json
from itertools import count
from pathlib import Path

from benchmarks.machine import ROOT

EXAMPLES = ROOT / "examples" / "train.jsonl"


def write_rows(path: Path, size: int) -> int:
    """Write at least `size` bytes of distinct rows; return the number of rows."""
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
