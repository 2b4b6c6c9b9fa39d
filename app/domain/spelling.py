"""Did-you-mean hints: finds the known word that a misspelt word is close to. It does not guess meanings."""

from collections import Counter
from collections.abc import Iterable, Sequence

LONGEST_WORD = 60


def did_you_mean(word: str, known: Sequence[str]) -> str | None:
    """A hint with the word of `known` that was misspelt, else with all of them. None if `known` is empty."""
    if meant := find_correction(word, known):
        return f"did you mean {meant!r}?"
    return f"known here: {', '.join(sorted(known))}" if known else None


def find_correction(word: str, known: Iterable[str]) -> str | None:
    """The name in `known` whose last part is closest to `word`. None if none is close, or several are equally close."""
    wrong = normalise_word(word[: LONGEST_WORD + 1])
    found = [
        (distance, name)
        for name in known
        if (distance := _count_slips(wrong, normalise_word(name.rsplit(".", 1)[-1]))) >= 0
    ]
    nearest = {name for distance, name in found if distance == min(found)[0]}
    return nearest.pop() if len(nearest) == 1 else None


def normalise_word(word: str) -> str:
    """`word` without case, underscores, hyphens and spaces."""
    return "".join(letter for letter in word.casefold() if letter not in "_- ")


def _count_slips(wrong: str, right: str) -> int:
    """Edit distance of two normalised words, 0 for a plural; -1 if it is over the limit."""
    if wrong in _list_plurals(right) or right in _list_plurals(wrong):
        return 0
    slips = 0 if len(right) < 4 else 1 if len(right) < 9 else 2
    if abs(len(wrong) - len(right)) > slips:
        return -1
    if (Counter(wrong) - Counter(right)).total() > slips or (Counter(right) - Counter(wrong)).total() > slips:
        return -1
    distance = _count_edits(wrong, right)
    return distance if distance <= slips else -1


def _list_plurals(word: str) -> tuple[str, ...]:
    """A word and its possible plurals."""
    return word, f"{word}s", f"{word}es", f"{word[:-1]}ies"


def _count_edits(one: str, other: str) -> int:
    """Optimal string alignment distance (restricted Damerau-Levenshtein): swapping two neighbours is one edit."""
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
