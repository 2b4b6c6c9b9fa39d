"""Which claim a chat is about. Knows messages, and nothing of steps."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from app.domain.claims import is_blank

INSTRUCTING = frozenset({"system", "developer"})
ANSWERING = frozenset({"tool", "function"})

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
    """The claim that a chat holds, what else could be taken for it, and why it cannot be told.

    `named`: every claim that follows a `Claim:`, in their order.
    """

    text: str | None = None
    named: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    doubt: str | None = None


def find_claim(messages: Sequence[Message]) -> ChatClaim:
    """The last `Claim: …` of a user in `messages`, which stand before the first answer, else the one user's text."""
    asking = [message for message in messages if message.role not in INSTRUCTING | ANSWERING]
    named = [claim for message in asking for claim in named_claims(message.text)]
    plain = [message for message in asking if not is_blank(message.text) and not _names_claim(message.text)]
    if named:
        passed_over = [claim for claim in named[:-1] if claim != named[-1]] + [message.text for message in plain]
        return ChatClaim(named[-1], tuple(named), tuple(passed_over), _two_in_one(named[-1]))
    instructed = [message for message in messages if message.role in INSTRUCTING and named_claims(message.text)]
    return _only(plain, instructed)


def named_claims(text: str) -> list[str]:
    """What follows each `Claim:`, to the end of its line, without the asterisks or underscores of Markdown."""
    return [_unemphasised(found) for found in _CLAIM.finditer(_capitalised(text))]


def names_claim_first(text: str) -> bool:
    return _MARKED.match(_capitalised(text).strip()) is not None


def _only(plain: Sequence[Message], instructed: Sequence[Message]) -> ChatClaim:
    found = sorted([*plain, *instructed], key=lambda message: message.number)
    if len(found) > 1:
        numbers = " and ".join(str(message.number) for message in found[:2])
        doubt = f"messages {numbers} could both hold the claim; write `Claim: …` in the one that does"
        return ChatClaim(doubt=doubt)
    if not found:
        return ChatClaim()
    return ChatClaim(found[0].text) if plain else _named_once(named_claims(found[0].text))


def _named_once(named: Sequence[str]) -> ChatClaim:
    passed_over = tuple(claim for claim in named[:-1] if claim != named[-1])
    return ChatClaim(named[-1], tuple(named), passed_over, _two_in_one(named[-1]))


def _two_in_one(claim: str) -> str | None:
    if not _names_claim(claim):
        return None
    return f"one line names two claims: {claim[:_SHOWN]!r}; write each `Claim: …` on a line of its own"


def _names_claim(text: str) -> bool:
    return _MARKED.search(_capitalised(text)) is not None


def _capitalised(text: str) -> str:
    """`claim:` at the beginning of a line is a marker, too; within a sentence it is a word."""
    return _LOWER.sub(r"\1Claim", text)


def _unemphasised(found: re.Match[str]) -> str:
    mark, claim = found["mark"], found["claim"].strip()
    if mark and found[0].split(":")[0].count(mark) < 2:
        return "".join(part.strip(" ") + " " for part in claim.split(mark, 1)).strip()
    wrapped = re.fullmatch(r"(\*{1,3}|_{1,3})(?=\S)(.*\S)\1", claim)
    return wrapped[2] if wrapped and wrapped[1] not in wrapped[2] else claim
