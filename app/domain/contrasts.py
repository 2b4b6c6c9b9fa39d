"""Changes a claim so that the same evidence decides it the other way: by a number, a name, or a negation.

A model that has seen both claims beside one sentence cannot tell them apart by the claim alone
(contrast sets, arXiv:2004.02709).
"""

import random
import re
from collections import defaultdict
from typing import NamedTuple

from app.domain.claims import Verdict
from app.domain.words import list_words

NAMES_KEPT = 200
"""Most names that are kept for each preceding word."""

_NUMBER = re.compile(r"(?<![\w.,-])\d{1,3}(?:,\d{3})+(?![\w-])|(?<![\w.,-])\d{1,4}(?![\w,-]|\.\d)")
_NAME = re.compile(r"(?<=\w )[A-Z][\w'’-]+(?: (?:of |the |de |von |van )?[A-Z][\w'’-]+)*")
_DATES = frozenset(
    re.findall(
        r"\w+",
        "January February March April May June July August September October November December "
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    )
)
"""They are no names: what precedes them precedes other words, too."""

_COPULA = re.compile(r"\b(?:is|was|are|were)\b(?! (?:not|only|never|no)\b)")


class Contrast(NamedTuple):
    claim: str
    label: Verdict


class ContrastBuilder:
    """Builds contrasts. Names come from the claims that it was given before: `France` after `in` is replaced by
    another name after `in`."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._names: dict[str, list[str]] = defaultdict(list)

    def build(self, claim: str, label: Verdict, title: str, quoted: str, observed: str) -> Contrast | None:
        """The contrast of a claim, None if there is none. It depends on the seed, the claim and the claims before.

        `title`: the page's, whose words stay. `quoted`: the sentence that decides. `observed`: all that was read; what
        takes the place of a number or name does not occur in it.
        """
        rng = random.Random(f"{self._seed}/{claim}")
        self._remember(claim)
        if label is Verdict.NOT_ENOUGH_INFO:
            return None
        # As many of the claims that are supported as of the others are negated: a "not" must not tell the label.
        if rng.random() < 0.5:
            changed = _negate(claim)
        elif label is Verdict.SUPPORTS:
            changed = self._change_number(rng, claim, quoted, observed) or self._change_name(
                rng, claim, title, quoted, observed
            )
        else:
            changed = None
        other = Verdict.REFUTES if label is Verdict.SUPPORTS else Verdict.SUPPORTS
        return Contrast(changed, other) if changed else None

    def _remember(self, claim: str) -> None:
        for found in _find_names(claim):
            known = self._names[_word_before(claim, found.start())]
            if found.group() not in known and len(known) < NAMES_KEPT:
                known.append(found.group())

    def _change_number(self, rng: random.Random, claim: str, quoted: str, observed: str) -> str | None:
        numbers = [found for found in _NUMBER.finditer(claim) if found.group() in _NUMBER.findall(quoted)]
        if not numbers:
            return None
        chosen = rng.choice(numbers)
        value = int(chosen.group().replace(",", ""))
        spread = max(3, min(15, value // 2)) if value < 10_000 else value // 4
        others = [_write_like(chosen.group(), value + rng.choice((-1, 1)) * rng.randint(1, spread)) for _ in range(8)]
        return _replace(claim, chosen, [other for other in others if other and other not in observed])

    def _change_name(self, rng: random.Random, claim: str, title: str, quoted: str, observed: str) -> str | None:
        own = set(list_words(title))
        names = [
            found
            for found in _find_names(claim)
            if found.group() in quoted and not own & set(list_words(found.group()))
        ]
        if not names:
            return None
        chosen = rng.choice(names)
        known = self._names[_word_before(claim, chosen.start())]
        others = [name for name in known if name not in observed and name not in claim]
        return _replace(claim, chosen, rng.sample(others, min(1, len(others))))


def _find_names(claim: str) -> list[re.Match[str]]:
    return [found for found in _NAME.finditer(claim) if found.group().split()[0] not in _DATES]


def _negate(claim: str) -> str | None:
    """The claim with `not` after its only copula."""
    found = list(_COPULA.finditer(claim))
    return f"{claim[: found[0].end()]} not{claim[found[0].end() :]}" if len(found) == 1 else None


def _replace(claim: str, found: re.Match[str], others: list[str]) -> str | None:
    return f"{claim[: found.start()]}{others[0]}{claim[found.end() :]}" if others else None


def _write_like(text: str, value: int) -> str:
    """The number, with commas if `text` has some; empty if it is not positive."""
    written = f"{value:,}" if "," in text else str(value)
    return written if value > 0 else ""


def _word_before(claim: str, start: int) -> str:
    words = claim[:start].split()
    return words[-1].casefold() if words else ""
