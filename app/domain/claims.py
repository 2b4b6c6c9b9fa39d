"""Claims and verdicts: the sentence to be judged and the three ways to judge it."""

import re
import unicodedata
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator

CLAIM_LIMIT = 2_000
"""Longest claim in characters. FEVER's longest is under 500; the bound keeps a prompt from eating its context."""

STEP_MARKER = re.compile(
    # The look-behinds stand for a leading \b, which would keep the engine from skipping ahead to a capital.
    r"(Thought|Action|Observation)(?<!\wThought)(?<!\wAction)(?<!\wObservation)\s*(\d+)\s*:"
)
"""What begins a step's part in the ReAct text format. No field of a step, and no claim, may hold one."""


_FORBIDDEN = re.compile("[\0\ud800-\udfff]")

INVISIBLE = (
    "\\s\x00-\x1f\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202f\u205f-\u206f"
    "\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""White space, and what a reader cannot tell from it or cannot see at all: what a pattern's `[…]` holds.

Unicode's default ignorable characters, the controls, and the letters that are drawn as nothing (U+2800, U+3164).
"""
_VISIBLE = re.compile(f"[^{INVISIBLE}]")


class Verdict(StrEnum):
    """How a claim is judged. Spelled this way on the wire, in datasets and in `Finish[…]`."""

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
    """The verdict that `text` spells, in any case and with `_` or `-` for spaces; None when it spells none."""
    folded = " ".join(re.sub(r"[_\-\s]+", " ", text).strip(" .\"'").upper().split())
    return _SPELLINGS.get(folded)


def is_blank(text: str) -> bool:
    """Whether a reader sees nothing of `text`: it is empty, white, or made of characters such as U+200B."""
    return _VISIBLE.search(text) is None


def to_one_line(text: str) -> str:
    """`text` on one line: NFC, runs of white space become one space, ends trimmed. "" for what is blank."""
    if is_blank(text):
        return ""
    normal = text if text.isascii() else unicodedata.normalize("NFC", text)  # ASCII is in NFC; most texts are ASCII
    return " ".join(normal.split())


def forbidden_character(text: str) -> str | None:
    """The name of the first character that no text here may hold (NUL, a lone surrogate), else None."""
    found = _FORBIDDEN.search(text)
    if found is None:
        return None
    return "a NUL character" if found.group() == "\0" else f"a lone surrogate (U+{ord(found.group()):04X})"


def check_claim(text: str) -> str:
    """The claim on one line. Raises ValueError for an empty, over-long or step-like claim."""
    if bad := forbidden_character(text):
        raise ValueError(f"the claim holds {bad}")
    claim = to_one_line(text)
    if not claim:
        raise ValueError("the claim holds no character that can be seen" if text.strip() else "the claim is empty")
    if len(claim) > CLAIM_LIMIT:
        raise ValueError(f"the claim has {len(claim):,} characters; at most {CLAIM_LIMIT:,} are read")
    if marker := STEP_MARKER.search(claim):
        raise ValueError(
            f"the claim holds {marker.group(0)!r}, which begins a step of a trajectory; "
            "send the sentence to be judged alone"
        )
    return claim


Claim = Annotated[str, AfterValidator(check_claim)]
