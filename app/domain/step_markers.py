"""Rewrites step markers in other spellings as `Thought 1:`, `Action 1:` and `Observation 1:`."""

import re

from app.domain.claims import STEP_MARKER

_WORD = r"(?:Thought|Action|Observation)"
_EMPHASIS = re.compile(rf"(?P<mark>\*{{1,3}}|_{{1,3}})({_WORD}[ \t]*\d*)[ \t]*(?:(?P=mark)[ \t]*:|:[ \t]*(?P=mark))")
_HEADING = re.compile(rf"^[ \t]*#{{1,6}}[ \t]+(?={_WORD}[ \t]*\d*[ \t]*:)", re.MULTILINE)
_ACTION = re.compile(r"(?<!\S)Action[ \t]*:\s*(?=(?:search|lookup|finish)\b)", re.IGNORECASE)
_FIRST = re.compile(r"\s*(?:Thought|Action)[ \t]*:")
_UNNUMBERED = re.compile(
    r"(?<!\S)(Thought)[ \t]*:|(?<!\S)(Action)[ \t]*:(?=\s*(?i:search|lookup|finish)\b)"
    r"|(?:^[ \t]*|(?<=\])\.?\s+)(Observation)[ \t]*:",
    re.MULTILINE,
)
_OBSERVATION = re.compile(r"\s*Observation[ \t]*:\s*")


def remove_markup(text: str) -> str:
    """Removes Markdown from markers such as `**Thought 1:**` and `### Thought 1:`."""
    if "*" not in text and "_" not in text and "#" not in text:
        return text
    return _HEADING.sub("", _EMPHASIS.sub(r"\2:", text))


def number_markers(text: str) -> str:
    """Writes `Thought 1:` for `Thought:` if the text has no numbers.

    Every step gets 1, because numbers are not trusted.
    """
    if STEP_MARKER.search(text) or not (_FIRST.match(text) or _ACTION.search(text)):
        return text
    return _UNNUMBERED.sub(lambda found: f"\n{found.group(found.lastindex or 0)} 1:", text)


def observation_text(text: str) -> str:
    """Text of a message that answers an action, without a leading `Observation:`."""
    return _OBSERVATION.sub("", text, count=1) if _OBSERVATION.match(text) else text
