"""Parts of a dataset: what is trained on, what is looked at while training, what is held back for the end."""

from collections.abc import Sequence
from enum import StrEnum


class SplitName(StrEnum):
    """In the order of the numbers 0, 1, 2 by which a column may name them."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


SPLIT_NAMES = tuple(SplitName)
_WORDS = {str(number): part for number, part in enumerate(SPLIT_NAMES)} | {part.value: part for part in SPLIT_NAMES}


def read_split_name(value: object) -> SplitName | None:
    """The part that a column's value names, None for an empty one. Raises ValueError for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = "" if value is None else str(value).strip().lower()
    if not word:
        return None
    if word not in _WORDS:
        raise ValueError(f"{str(value)[:40]!r} is no part; write 0, 1, 2 or train, validation, test")
    return _WORDS[word]


def draw_split(drawn: float, probabilities: Sequence[float]) -> SplitName:
    """The part that `drawn`, from 0 to below 1, falls into when each has its share of that range."""
    for part, share in zip(SPLIT_NAMES, probabilities, strict=True):
        if drawn < share:
            return part
        drawn -= share
    return SplitName.TRAIN  # the shares are a rounding error short of 1
