"""Claims and verdicts: the sentence to judge, and the three verdicts (the labels of FEVER, arXiv:1803.05355)."""

import re
import unicodedata
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator

CLAIM_LIMIT = 2_000
"""Longest claim, in characters. FEVER's longest is under 500. The limit leaves room in the context for the steps."""

STEP_MARKER = re.compile(
    # Look-behinds instead of a leading \b: the regex engine can then skip ahead to a capital T, A or O.
    r"(Thought|Action|Observation)(?<!\wThought)(?<!\wAction)(?<!\wObservation)\s*(\d+)\s*:"
)
"""A marker such as `Thought 1:` begins a part of a step in ReAct text. Claims and step fields may not contain one."""


_FORBIDDEN = re.compile("[\0\ud800-\udfff]")

INVISIBLE = (
    "\\s\x00-\x1f\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202f\u205f-\u206f"
    "\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""White space and invisible characters, written for use inside `[…]` of a regular expression.

These are Unicode's default ignorable characters, the controls, and letters without a glyph (U+2800, U+3164).
"""
_VISIBLE = re.compile(f"[^{INVISIBLE}]")


class Verdict(StrEnum):
    """The verdict on a claim. The spelling is the same in HTTP, in datasets and in `Finish[…]`."""

    SUPPORTS = "SUPPORTS"
    REFUTES = "REFUTES"
    NOT_ENOUGH_INFO = "NOT ENOUGH INFO"


_SPELLINGS = {
    "SUPPORTS": Verdict.SUPPORTS,
    "SUPPORTED": Verdict.SUPPORTS,
    "SUPPORT": Verdict.SUPPORTS,
    "REFUTES": Verdict.REFUTES,
    "REFUTED": Verdict.REFUTES,
    "REFUTE": Verdict.REFUTES,
    "NOT ENOUGH INFO": Verdict.NOT_ENOUGH_INFO,
    "NOT ENOUGH INFORMATION": Verdict.NOT_ENOUGH_INFO,
    "NEI": Verdict.NOT_ENOUGH_INFO,
}


def parse_verdict(text: str) -> Verdict | None:
    """The verdict that `text` spells, or None. Case is ignored; `_` and `-` count as spaces."""
    folded = " ".join(re.sub(r"[_\-\s]+", " ", text).strip(" .\"'").upper().split())
    return _SPELLINGS.get(folded)


def is_blank(text: str) -> bool:
    """Whether `text` shows nothing: it is empty or made of white space and invisible characters such as U+200B."""
    return _VISIBLE.search(text) is None


def to_one_line(text: str) -> str:
    """`text` on one line: in NFC, with single spaces, trimmed. "" if `text` is blank."""
    if is_blank(text):
        return ""
    normal = text if text.isascii() else unicodedata.normalize("NFC", text)  # ASCII is always in NFC
    return " ".join(normal.split())


def forbidden_character(text: str) -> str | None:
    """Name of the first forbidden character (NUL or a lone surrogate) in `text`, else None."""
    found = _FORBIDDEN.search(text)
    if found is None:
        return None
    return "a NUL character" if found.group() == "\0" else f"a lone surrogate (U+{ord(found.group()):04X})"


def check_claim(text: str) -> str:
    """The claim on one line. Raises ValueError if it is empty, too long, or contains a step marker."""
    if bad := forbidden_character(text):
        raise ValueError(f"the claim holds {bad}")
    claim = to_one_line(text)
    if not claim:
        raise ValueError("the claim holds no visible character" if text.strip() else "the claim is empty")
    if len(claim) > CLAIM_LIMIT:
        raise ValueError(f"the claim has {len(claim):,} characters; the limit is {CLAIM_LIMIT:,}")
    if marker := STEP_MARKER.search(claim):
        raise ValueError(
            f"the claim holds {marker.group(0)!r}, which begins a step of a trajectory; send only the sentence to judge"
        )
    return claim


Claim = Annotated[str, AfterValidator(check_claim)]
