"""FEVER claims with their pages, from the shared data: a corpus, and claims in three page-disjoint parts."""

import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from app.domain.claims import check_claim, to_one_line
from app.domain.corpora import clean_page_text
from benchmarks.machine import ROOT

DATA = ROOT.parent / "shared" / "data"
PARTS = {"train": 0.60, "dev": 0.75, "test": 1.0}
"""Part → the upper bound of its range of the hash of a page's title."""

SHUFFLE = 7


class FeverClaim(NamedTuple):
    claim: str
    label: str
    page: str
    evidence: tuple[int, ...]

    def as_row(self) -> dict[str, Any]:
        """As `POST /datasets` with kind=claims takes it."""
        return {
            "claim": self.claim,
            "label": self.label,
            "page": self.page,
            "evidence": [[self.page, sentence] for sentence in self.evidence],
        }


class Fever:
    """`pages`: title → sentences, as a corpus stores them."""

    def __init__(self) -> None:
        self.pages: dict[str, list[str]] = {}
        for row in _read("fever_pages.jsonl"):
            self.pages[to_one_line(row["title"])] = [clean_page_text(text) for text in row["sentences"]]

    def write_corpus(self, path: Path) -> Path:
        """The claims' pages, and the leads of other articles beside them."""
        with path.open("w", encoding="utf-8") as out:
            for title, sentences in self.pages.items():
                out.write(json.dumps({"title": title, "sentences": sentences}) + "\n")
            for row in _read("wiki_leads.jsonl"):
                if to_one_line(row["title"]) not in self.pages:
                    out.write(json.dumps(row) + "\n")
        return path

    def list_claims(self, part: str) -> list[FeverClaim]:
        """The claims of a part, each text once, in a fixed random order."""
        claims: dict[str, FeverClaim] = {}
        for row in _read("fever_claims.jsonl"):
            claim, page = check_claim(row["claim"]), to_one_line(row["page"])
            if _part_of(row["page"]) == part:
                evidence = self._find_evidence(page, row["evidence_text"] or "")
                claims.setdefault(claim, FeverClaim(claim, row["label"], page, evidence))
        ordered = list(claims.values())
        random.Random(SHUFFLE).shuffle(ordered)
        return ordered

    def _find_evidence(self, page: str, text: str) -> tuple[int, ...]:
        """Numbers of the page's sentences that the evidence contains; spelling and spaces aside."""
        letters = _letters(text)
        keyed = enumerate(map(_letters, self.pages[page]))
        return tuple(number for number, sentence in keyed if len(sentence) > 10 and sentence in letters)

    def first_sentences(self, page: str, count: int = 5) -> str:
        return " ".join(self.pages[page][:count])


def write_claims(claims: list[FeverClaim], path: Path) -> Path:
    path.write_text("".join(json.dumps(claim.as_row()) + "\n" for claim in claims), encoding="utf-8")
    return path


def _part_of(title: str) -> str:
    drawn = int.from_bytes(hashlib.sha256(title.encode()).digest()[:4]) / 2**32
    return next(part for part, bound in PARTS.items() if drawn < bound)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _read(name: str) -> Iterator[Any]:
    with (DATA / name).open(encoding="utf-8") as file:
        yield from map(json.loads, file)
