"""Pages of a corpus, and the text functions that prepare them.

Building a corpus normalises each page's text, escapes text that looks like a step marker, and splits it into sentences.
An Observation quotes these sentences.
"""

import re
import unicodedata
from typing import Literal

from pydantic import Field

from app.domain.claims import INVISIBLE, to_one_line
from app.domain.frozen import Frozen


class CorpusPage(Frozen):
    """A page of a corpus. It has at least one sentence. A sentence's id is its index, from 0."""

    title: str = Field(min_length=1)
    sentences: tuple[str, ...] = Field(min_length=1)
    aliases: tuple[str, ...] = ()
    url: str | None = None


class Observation(Frozen):
    """The result of an Action, and its source.

    `sentences`: ids of the page's sentences that `text` quotes. `source`: `server` for text that comes from no page,
    such as a correction. `corpus` and `snapshot` (the corpus file's digest) are None then.
    """

    text: str
    page: str | None = None
    sentences: tuple[int, ...] = ()
    source: Literal["corpus", "memory", "server"] = "server"
    corpus: str | None = None
    snapshot: str | None = None


class CorpusFinding(Frozen):
    """A warning about a line of an uploaded corpus, or the reason why it was refused. Lines count from 1."""

    line: int
    code: str
    severity: Literal["warned", "refused"]
    message: str


class CorpusReport(Frozen):
    """The result of building a corpus. `findings` lists the first few. `counts`, by code, are exact."""

    lines: int
    pages: int
    sentences: int
    characters: int
    refused: int
    counts: dict[str, int]
    findings: tuple[CorpusFinding, ...]
    findings_left_out: int


# --- normalising ---------------------------------------------------------------------------

_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff]"
)
_BRACKETS = {
    "-LRB-": "(",
    "-RRB-": ")",
    "-LSB-": "[",
    "-RSB-": "]",
    "-LCB-": "{",
    "-RCB-": "}",
    "-COLON-": ":",
}
_BRACKET = re.compile("|".join(_BRACKETS))
# Every rule shortens the text, so applying them until nothing changes terminates. Rules that remove a tokeniser's
# spaces require a space or the end after the mark, so that ".NET" and "'tis" stay as they are.
# Patterns start with the text that they remove and look behind from there. That is many times faster.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"`` ?"), '"'),
    (re.compile(r" ?''"), '"'),
    (re.compile(r"`(?<!\S.) "), "'"),
    (re.compile(r" (?='(?: |$))"), ""),
    (re.compile(r" (?<=\w )(?='(?:s|m|d|re|ve|ll)\b)", re.IGNORECASE), ""),
    (re.compile(r" (?<=\w )(?=n't\b)", re.IGNORECASE), ""),
    (re.compile(r" -- (?<=\d -- )(?=\d+\b(?! [A-Z][a-z]))"), "–"),  # a range; two dates keep their spaces
    (re.compile(r"--(?<= --)(?= )"), "–"),
    (re.compile(r"([(\[{]) "), r"\1"),
    (re.compile(r" (?=[)\]}])"), ""),
    (re.compile(r" (?=[.,;:!?%]+(?: |$|[)\]}\"']))"), ""),
    (re.compile(r"([$#£€])(?<![^\s(].) (?=\d)"), r"\1"),
)


def normalise_page_text(text: str) -> str:
    """Page text in NFC, on one line, without a tokeniser's marks. Idempotent, linear time."""
    text = to_one_line(_INVISIBLE.sub("", text))
    while (tidied := _tidy(text)) != text:
        text = tidied
    return text


def _tidy(text: str) -> str:
    text = _BRACKET.sub(lambda mark: _BRACKETS[mark.group()], text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return to_one_line(text)


# --- text that looks like a step marker ----------------------------------------------------

_GAP = f"[{INVISIBLE}]*"
_COLON = "[:\u02d0\u2236\ua789\ufe13\ufe55\uff1a]"
_STEP = re.compile(rf"(?<!\w)((?:Thought|Action|Observation){_GAP}\d+){_GAP}{_COLON}", re.IGNORECASE)


def escape_steps(text: str) -> str:
    """Turns each step marker such as `Thought 1:` into `Thought 1,` and puts the text on one line. Idempotent.

    `parse_steps` finds a step at every marker, so text quoted from a page or a title must not contain one.
    """
    return to_one_line(_STEP.sub(r"\1,", to_one_line(text)))


def clean_page_text(text: str) -> str:
    """Normalises and escapes page text. A corpus stores the result; an Observation may quote it."""
    return escape_steps(normalise_page_text(text))


# --- names ---------------------------------------------------------------------------------

_NAME_MARKS = str.maketrans({"_": " ", "[": " ", "]": " "})


def fold_case(text: str) -> str:
    """The text casefolded and in NFC, for comparisons."""
    return unicodedata.normalize("NFC", text.casefold())


def page_name_key(name: str) -> str:
    """Search key of a page's name. Case, spacing, underscores and brackets do not change it."""
    return fold_case(to_one_line(clean_page_text(name).translate(_NAME_MARKS)))


def page_name_key_without_suffix(name: str) -> str | None:
    """The key of `Title` for `Title (disambiguation)`; None for a name without such a suffix."""
    match = re.fullmatch(r"(.*\S) \([^()]+\)", page_name_key(name))
    return match.group(1) if match else None


# --- sentences -----------------------------------------------------------------------------

_STOPS = ".!?…。！？।؟"  # the stops of other scripts
_CLOSERS = "\"'”’»)]}"
_OPENERS = "\"'“‘«([{"
_ENDINGS = frozenset(_STOPS + _CLOSERS)
_REFERENCE = re.compile(rf"(?<=[{re.escape(_STOPS + _CLOSERS)}])\[\w{{1,12}}\]")
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
_NEVER_LAST = re.compile(
    r"mr|mrs|ms|mx|dr|prof|st|ste|gen|col|maj|lt|sgt|cpl|capt|cmdr|adm|rev|fr|hon|"
    r"pres|gov|sen|rep|supt|vs|no|nos|vol|vols|pp|fig|figs|ed|eds|trans|lit|cf|ca|"
    r"approx|mt|ft|e[.]g|i[.]e|op|jan|feb|mar|apr|jun|jul|aug|sept|sep|oct|nov|dec"
)
_MAYBE_LAST = re.compile(r"jr|sr|inc|ltd|co|corp|bros|etc|al|est|ph[.]d|dept|univ")
_STARTERS = re.compile(
    r"a|about|according|after|all|also|although|among|an|and|another|as|at|because|before|"
    r"both|but|by|despite|due|during|each|following|for|from|he|her|his|however|if|in|it|"
    r"its|later|many|most|on|one|other|our|several|she|since|some|such|that|the|their|"
    r"then|there|these|they|this|those|though|through|to|today|two|under|until|upon|we|"
    r"when|where|while|with|you"
)


def split_sentences(text: str) -> list[str]:
    """Splits a text into sentences. Joined by spaces they are the text on one line. Linear time."""
    words = text.split()
    sentences, start = [], 0
    for at in range(1, len(words)):
        if words[at - 1][-1] in _ENDINGS and _ends_sentence(words[at - 1], words[at]):
            sentences.append(" ".join(words[start:at]))
            start = at
    return [*sentences, " ".join(words[start:])] if words else []


def _ends_sentence(word: str, following: str) -> bool:
    bare = _REFERENCE.sub("", word)
    stem = bare.rstrip(_STOPS + _CLOSERS)
    tail = bare[len(stem) :]
    if not any(mark in _STOPS for mark in tail):
        return False
    if tail == "..":  # the ReAct environment joined sentences with a second stop
        return True
    if not _can_start(following.lstrip(_OPENERS)):
        return False
    if tail != "." or bare != word:
        return True
    return _stop_is_final(stem.lstrip(_OPENERS), following)


def _can_start(word: str) -> bool:
    return bool(word) and (word[0] in "$£€#" or (word[0].isalnum() and not word[0].islower()))


def _stop_is_final(stem: str, following: str) -> bool:
    abbreviation = stem.casefold()
    if _NEVER_LAST.fullmatch(abbreviation):
        return False
    if _MAYBE_LAST.fullmatch(abbreviation) or _INITIALS.fullmatch(stem):
        return bool(_STARTERS.fullmatch(following.lstrip(_OPENERS).rstrip(",").casefold()))
    return True
