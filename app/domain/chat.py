"""Finds the claim of a chat row among its messages."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from app.domain.claims import is_blank

SYSTEM_ROLES = frozenset({"system", "developer"})
TOOL_ROLES = frozenset({"tool", "function"})

_LOWER = re.compile(r"^([ \t#>*_-]*)claim(?=[*_]*[ \t]*:)", re.MULTILINE)
_MARKER = r"(?P<mark>\*{1,3}|_{1,3}|)(?<![^\W_])(?:Claim|CLAIM)(?P=mark)?[ \t]*:"
_CLAIM = re.compile(rf"{_MARKER}[^\S\n]*(?:\n\s*(?!\w+[ \t]*:))?(?P<claim>\S.*)")
_MARKED = re.compile(_MARKER)
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a chat. `number` counts from 1; `role` is in lower case."""

    number: int
    role: str
    text: str


@dataclass(frozen=True, slots=True)
class ChatClaim:
    """The claim of a chat.

    `named`: every text behind a `Claim:`, in order. `ignored`: other texts that could be the claim. `ambiguity`: why
    no claim can be chosen.
    """

    text: str | None = None
    named: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    ambiguity: str | None = None


def find_chat_claim(messages: Sequence[Message]) -> ChatClaim:
    """The claim in `messages`, which come before the first answer: the last `Claim: …`, else the only user message."""
    asking = [message for message in messages if message.role not in SYSTEM_ROLES | TOOL_ROLES]
    named = [claim for message in asking for claim in find_marked_claims(message.text)]
    plain = [message for message in asking if not is_blank(message.text) and not _has_claim_marker(message.text)]
    if named:
        ignored = [claim for claim in named[:-1] if claim != named[-1]] + [message.text for message in plain]
        return ChatClaim(named[-1], tuple(named), tuple(ignored), _find_second_claim(named[-1]))
    instructed = [message for message in messages if message.role in SYSTEM_ROLES and find_marked_claims(message.text)]
    return _choose_unmarked(plain, instructed)


def find_marked_claims(text: str) -> list[str]:
    """The text behind each `Claim:`, up to the end of its line, without Markdown emphasis."""
    return [_strip_emphasis(found) for found in _CLAIM.finditer(_capitalise_markers(text))]


def starts_with_claim_marker(text: str) -> bool:
    return _MARKED.match(_capitalise_markers(text).strip()) is not None


def _choose_unmarked(plain: Sequence[Message], instructed: Sequence[Message]) -> ChatClaim:
    found = sorted([*plain, *instructed], key=lambda message: message.number)
    if len(found) > 1:
        numbers = " and ".join(str(message.number) for message in found[:2])
        ambiguity = f"messages {numbers} could both hold the claim; write `Claim: …` in the one that does"
        return ChatClaim(ambiguity=ambiguity)
    if not found:
        return ChatClaim()
    return ChatClaim(found[0].text) if plain else _choose_last_marked(find_marked_claims(found[0].text))


def _choose_last_marked(named: Sequence[str]) -> ChatClaim:
    ignored = tuple(claim for claim in named[:-1] if claim != named[-1])
    return ChatClaim(named[-1], tuple(named), ignored, _find_second_claim(named[-1]))


def _find_second_claim(claim: str) -> str | None:
    if not _has_claim_marker(claim):
        return None
    return f"one line names two claims: {claim[:_SHOWN]!r}; write each `Claim: …` on a line of its own"


def _has_claim_marker(text: str) -> bool:
    return _MARKED.search(_capitalise_markers(text)) is not None


def _capitalise_markers(text: str) -> str:
    """Capitalises `claim:` at the start of a line, where it is a marker. Inside a sentence it is a word."""
    return _LOWER.sub(r"\1Claim", text)


def _strip_emphasis(found: re.Match[str]) -> str:
    mark, claim = found["mark"], found["claim"].strip()
    if mark and found[0].split(":")[0].count(mark) < 2:
        return "".join(part.strip(" ") + " " for part in claim.split(mark, 1)).strip()
    wrapped = re.fullmatch(r"(\*{1,3}|_{1,3})(?=\S)(.*\S)\1", claim)
    return wrapped[2] if wrapped and wrapped[1] not in wrapped[2] else claim
