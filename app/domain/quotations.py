"""Finds a Thought's quotations again in what was read, so that a prediction cites the sentences that decided."""

import re
from collections.abc import Sequence

from app.domain.claims import Verdict
from app.domain.predictions import CitedSentence, Stance

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
_STANCES: dict[Verdict, Stance] = {Verdict.SUPPORTS: "supports", Verdict.REFUTES: "refutes"}


def find_quotations(thought: str, observations: Sequence[str]) -> list[str]:
    """The quoted parts of a Thought. What lies between its first and its last quotation mark is one quotation if an
    Observation contains it, because a sentence may quote, too."""
    first, last = thought.find('"'), thought.rfind('"')
    whole = thought[first + 1 : last]
    if last > first + 1 and any(whole in text for text in observations):
        return [whole]
    return [straight or curly for straight, curly in _QUOTED.findall(thought)]


def cite(
    thought: str, verdict: Verdict, observations: Sequence[str], read: Sequence[CitedSentence]
) -> tuple[tuple[CitedSentence, ...], bool]:
    """(the sentences that `thought` quotes, whether it quotes something and all of it was observed).

    Each has the span of its characters that are quoted, and as its stance that of the verdict. If no sentence is
    quoted, these are all sentences that were read, as neutral ones.
    """
    quoted = find_quotations(thought, observations)
    verified = bool(quoted) and all(any(text in observed for observed in observations) for text in quoted)
    stance = _STANCES.get(verdict, "neutral")
    found: dict[tuple[str, int], CitedSentence] = {}
    for text in quoted:
        for sentence in read:
            span = _overlap(text, sentence.text)
            if span is not None:
                cited = sentence.model_copy(update={"span": span, "stance": stance})
                found.setdefault((sentence.page, sentence.sentence_id), cited)
    return tuple(found.values()) or tuple(read), verified


def _overlap(quotation: str, sentence: str) -> tuple[int, int] | None:
    """The span of the sentence that is quoted: a part of it, or the whole within a longer quotation."""
    start = sentence.find(quotation)
    if start >= 0:
        return start, start + len(quotation)
    return (0, len(sentence)) if sentence and sentence in quotation else None
