"""Splits of a dataset: train, validation (evaluated during training) and test (evaluated at the end)."""

import hashlib
from collections.abc import Sequence
from enum import StrEnum


class SplitName(StrEnum):
    """A split. A column may also name them 0, 1 and 2, in this order."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


SPLIT_NAMES = tuple(SplitName)
_WORDS = {str(number): part for number, part in enumerate(SPLIT_NAMES)} | {part.value: part for part in SPLIT_NAMES}


def read_split_name(value: object) -> SplitName | None:
    """The split that a column's value names, None for an empty value. Raises ValueError for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = "" if value is None else str(value).strip().lower()
    if not word:
        return None
    if word not in _WORDS:
        raise ValueError(f"{str(value)[:40]!r} is not a split; write 0, 1, 2 or train, validation, test")
    return _WORDS[word]


def draw_uniform(text: str) -> float:
    """A number in [0, 1), the same on every machine: a hash of `text`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32


def draw_split(drawn: float, probabilities: Sequence[float]) -> SplitName:
    """The split for a random number `drawn` in [0, 1), by the splits' shares of that range."""
    for part, share in zip(SPLIT_NAMES, probabilities, strict=True):
        if drawn < share:
            return part
        drawn -= share
    return SplitName.TRAIN  # rounding: the shares may add up to a little less than 1
