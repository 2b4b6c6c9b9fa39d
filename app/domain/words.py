"""Words of claims and sentences, for choosing the sentence of a page that is nearest to a claim."""

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")
_FUNCTION_WORDS = frozenset(
    _WORD.findall(
        "a about after all also although an and any are as at be became because become been before being both "
        "but by can did do does during each for from had has have he her hers him his how i if in into is it "
        "its itself just made more most no nor not of on only or other our out over own she since so some "
        "such than that the their them then there these they this those through to too under until up very "
        "was we were what when where which while who whom whose why will with would you your isn't wasn't "
        "aren't weren't doesn't didn't hasn't hadn't "
    )
)
"""English words that say nothing about a claim's subject."""


def list_words(text: str) -> list[str]:
    """The words of a text, casefolded, in order."""
    return [word.casefold() for word in _WORD.findall(text)]


def content_words(text: str, without: str = "") -> set[str]:
    """The words of `text` that carry meaning, less those of `without`."""
    return set(list_words(text)) - _FUNCTION_WORDS - set(list_words(without))


def count_shared(sentence: str, words: set[str]) -> int:
    """Number of `words` that the sentence contains, a longer form of a word (`films` for `film`) included."""
    found = set(list_words(sentence))
    return sum(
        word in found or (len(word) > 3 and any(other.startswith(word[:-1]) for other in found)) for word in words
    )


def nearest_sentence(sentences: Sequence[str], words: set[str]) -> int:
    """Index of the sentence that shares most of `words`; the first of several."""
    return max(range(len(sentences)), key=lambda i: (count_shared(sentences[i], words), -i))


def clip_around(sentence: str, words: set[str], limit: int) -> str:
    """The sentence, or the `limit` successive words of it that share most of `words`."""
    parts = sentence.split(" ")
    if len(parts) <= limit:
        return sentence
    starts = range(len(parts) - limit + 1)
    windows = [" ".join(parts[start : start + limit]) for start in starts]
    return max(windows, key=lambda window: count_shared(window, words))
