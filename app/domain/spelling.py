"""Misspelt words: which known word was probably meant. Words of another meaning are not offered, however alike."""

from collections import Counter
from collections.abc import Iterable, Sequence

LONGEST_WORD = 60


def did_you_mean(word: str, known: Sequence[str]) -> str | None:
    """A hint that names the word of `known` that was misspelt, or all of them; None when nothing is known."""
    if meant := find_correction(word, known):
        return f"did you mean {meant!r}?"
    return f"known here: {', '.join(sorted(known))}" if known else None


def find_correction(word: str, known: Iterable[str]) -> str | None:
    """The name in `known` whose last part `word` misspells. None where several names are as near."""
    wrong = normalise_word(word[: LONGEST_WORD + 1])
    found = [
        (distance, name)
        for name in known
        if (distance := _misspelt(wrong, normalise_word(name.rsplit(".", 1)[-1]))) >= 0
    ]
    nearest = {name for distance, name in found if distance == min(found)[0]}
    return nearest.pop() if len(nearest) == 1 else None


def normalise_word(word: str) -> str:
    """`word` without case, underscores, hyphens and spaces."""
    return "".join(letter for letter in word.casefold() if letter not in "_- ")


def _misspelt(wrong: str, right: str) -> int:
    """The number of slips between two plain words, 0 for a plural; -1 when they are too many."""
    if wrong in _numbers(right) or right in _numbers(wrong):
        return 0
    slips = 0 if len(right) < 4 else 1 if len(right) < 9 else 2
    if abs(len(wrong) - len(right)) > slips:
        return -1
    if (Counter(wrong) - Counter(right)).total() > slips or (Counter(right) - Counter(wrong)).total() > slips:
        return -1
    distance = _distance(wrong, right)
    return distance if distance <= slips else -1


def _numbers(word: str) -> tuple[str, ...]:
    """A word and its plurals."""
    return word, f"{word}s", f"{word}es", f"{word[:-1]}ies"


def _distance(one: str, other: str) -> int:
    """Edits from one word to another, by optimal string alignment: a swap of two neighbours is one edit."""
    before: list[int] = []
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one, start=1):
        line = [row]
        for column, against in enumerate(other, start=1):
            line.append(min(line[-1] + 1, above[column] + 1, above[column - 1] + (letter != against)))
            if row > 1 and column > 1 and letter == other[column - 2] and one[row - 2] == against:
                line[-1] = min(line[-1], before[column - 2] + 1)
        before, above = above, line
    return above[-1]
