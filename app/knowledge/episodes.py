"""Plays an episode for a labelled claim in the real environment, and writes it down as a trajectory.

No model takes part: the claim, its page and its evidence determine the Actions, and a seed the wording. Each
Observation is what the corpus answers to its Action, so a replay gives it again.
"""

import random
import re
from dataclasses import dataclass

from app.domain.claims import Verdict
from app.domain.corpora import CorpusPage, fold_case
from app.domain.thoughts import build_last_thought, build_lookup_thought, build_miss_thought, build_search_thought
from app.domain.trajectories import ARGUMENT_LIMIT, Action, ActionName, Evidence, Step, Trajectory
from app.domain.words import clip_around, content_words, list_words, nearest_sentence
from app.knowledge.base import KnowledgeExplorer, KnowledgeSource

QUOTED_WORDS = 40
"""Most words of a quotation."""

THOUGHT_CHARACTERS = 480
"""Longest last Thought: about the 128 tokens that a Thought may have when an adapter serves."""

NAME_WORDS = 6
"""Most words of a page's name that is looked for in a claim."""

LOOKUPS = 3
"""Most Lookups of one episode."""

MISS_SHARE = 0.06
"""Share of episodes that begin with a Search that finds nothing, as far as one can be made up."""

EXTRA_LOOKUP_SHARE = 0.12
"""Share of episodes that look a word up although the first Observation shows what they need."""


class RowRefused(Exception):
    """No trajectory can be made of a row. `code`: the reason, one of `app.domain.synthesis.REASONS`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class LabelledClaim:
    """A claim to play an episode for. `page`: a title; if None, one that the claim names."""

    claim: str
    label: Verdict
    page: str | None = None
    evidence: tuple[Evidence, ...] = ()


class Episode:
    """One episode: `play` runs it once."""

    def __init__(self, source: KnowledgeSource, row: LabelledClaim, seed: int) -> None:
        self._source = source
        self._row = row
        self._rng = random.Random(f"{seed}/{row.claim}")
        self._explorer = KnowledgeExplorer(source)
        self._steps: list[Step] = []
        self._shown: set[int] = set()

    def play(self) -> Trajectory:
        """The trajectory. Raises RowRefused."""
        page = self._find_page()
        words = content_words(self._row.claim, without=page.title) or content_words(self._row.claim)
        target = self._choose_sentence(page, words)
        refuse_doubted_label(self._row, page, target)
        self._open(page)
        self._look_up(page, target)
        if self._row.label is Verdict.NOT_ENOUGH_INFO:
            shown = sorted(self._shown)
            target = shown[nearest_sentence([page.sentences[i] for i in shown], words)]
        elif target not in self._shown:
            raise RowRefused(
                "evidence_unreachable", f"no word of the claim leads to sentence {target} of {page.title!r}"
            )
        quoted = clip_around(page.sentences[target], words, QUOTED_WORDS)
        thought = build_last_thought(self._rng, quoted, self._row.claim)
        if len(thought) > THOUGHT_CHARACTERS:
            raise RowRefused("unwritable", f"the last Thought would have {len(thought):,} characters")
        self._steps.append(
            Step(
                thought=thought,
                action=Action(name=ActionName.FINISH, argument=self._row.label.value),
            )
        )
        return Trajectory(claim=self._row.claim, steps=tuple(self._steps), evidence=self._row.evidence, page=page.title)

    # What the episode is about.

    def _find_page(self) -> CorpusPage:
        """The row's page, or the one that its claim names. The evidence does not decide: a NOT ENOUGH INFO row has
        none, so the Search would tell the label."""
        if self._row.page is None:
            return self._find_named_page()
        page = self._source.search(self._row.page).page
        if page is None:
            raise RowRefused("page_missing", f"the corpus has no page {self._row.page[:100]!r}")
        return page

    def _find_named_page(self) -> CorpusPage:
        """The page that the claim names: the first words of it that open one, as many as possible."""
        words = [word.strip(".,;:!?\"'()[]") for word in self._row.claim.split()]
        for start in range(len(words)):
            for end in range(min(len(words), start + NAME_WORDS), start, -1):
                name = " ".join(words[start:end])
                page = self._source.search(name).page if content_words(name) else None
                if page is not None:
                    return page
        raise RowRefused("page_not_named", "the row names no page, and no words of its claim open one")

    def _choose_sentence(self, page: CorpusPage, words: set[str]) -> int:
        """The sentence that the verdict rests on: of the page's evidence, or of all its sentences, the one nearest to
        the claim."""
        given = [one.sentence for one in self._row.evidence if self._source.search(one.page).page == page]
        if any(not 0 <= i < len(page.sentences) for i in given):
            raise RowRefused(
                "evidence_missing", f"{page.title!r} has {len(page.sentences)} sentences; the evidence names another"
            )
        if self._row.evidence and not given:
            raise RowRefused("evidence_elsewhere", f"the evidence is on other pages than {page.title!r}")
        among = given or list(range(len(page.sentences)))
        return among[nearest_sentence([page.sentences[i] for i in among], words)]

    # Actions.

    def _open(self, page: CorpusPage) -> None:
        name = self._spell(page)
        wrong = self._wrong_name(page, name) if self._rng.random() < MISS_SHARE else None
        if wrong is not None:
            self._search(wrong, build_search_thought(self._rng, wrong))
            self._search(page.title, build_miss_thought(self._rng, page.title))
        else:
            self._search(name, build_search_thought(self._rng, name))

    def _spell(self, page: CorpusPage) -> str:
        """The page's name as the claim spells it, if that opens the page, else its title."""
        for name in (page.title, page.title.split(" (")[0], *page.aliases):
            found = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", self._row.claim, re.IGNORECASE)
            if found and self._opens(found.group(), page):
                return found.group()
        if not self._opens(page.title, page):
            raise RowRefused("unwritable", f"no Search can name the page {page.title[:100]!r}")
        return page.title

    def _opens(self, name: str, page: CorpusPage) -> bool:
        usable = 0 < len(name) <= ARGUMENT_LIMIT and "[" not in name and "]" not in name
        return usable and self._source.search(name).page == page

    def _wrong_name(self, page: CorpusPage, name: str) -> str | None:
        """A name that opens no page, in answer to which the page's title is offered."""
        for word in self._keywords(page):
            wrong = f"{name} {word}"
            found = self._source.search(wrong) if len(wrong) <= ARGUMENT_LIMIT else None
            if found and found.page is None and page.title in found.similar:
                return wrong
        return None

    def _keywords(self, page: CorpusPage) -> list[str]:
        """Words of the claim to look up, as it spells them: names and numbers first."""
        wanted = content_words(self._row.claim, without=page.title)
        words = [word.strip(".,;:!?\"'()[]") for word in self._row.claim.split()]
        words = [word for word in dict.fromkeys(words) if word.casefold() in wanted and "[" not in word]
        return sorted(words, key=lambda word: not (word[0].isupper() or word[0].isdigit()))

    def _look_up(self, page: CorpusPage, target: int) -> None:
        """Lookups until the sentence is shown; without need, one in some episodes."""
        keywords = self._keywords(page)
        if target in self._shown:
            if keywords and self._rng.random() < EXTRA_LOOKUP_SHARE:
                self._step_to(self._rng.choice(keywords), None)
            return
        for word in keywords:
            hits = [i for i, sentence in enumerate(page.sentences) if fold_case(word) in fold_case(sentence)]
            if target in hits[:LOOKUPS]:
                self._step_to(word, hits.index(target) + 1)
                return

    def _step_to(self, keyword: str, times: int | None) -> None:
        for _ in range(times or 1):
            thought = build_lookup_thought(self._rng, keyword)
            self._act(ActionName.LOOKUP, keyword, thought)

    def _search(self, name: str, thought: str) -> None:
        self._act(ActionName.SEARCH, name, thought)

    def _act(self, action: ActionName, argument: str, thought: str) -> None:
        search = action is ActionName.SEARCH
        observed = self._explorer.search(argument) if search else self._explorer.lookup(argument)
        self._shown |= set(observed.sentences)
        self._steps.append(
            Step(thought=thought, action=Action(name=action, argument=argument), observation=observed.text)
        )


def refuse_doubted_label(row: LabelledClaim, page: CorpusPage, target: int) -> None:
    """Raise RowRefused where the page contradicts the label by a year.

    A claim that names a year which the page does not, while the nearest sentence names another one, is not supported
    by it, and NOT ENOUGH INFO is doubtful: FEVER has such rows.
    """
    years = _years(row.claim)
    if row.label is Verdict.REFUTES or not years or years & _years(" ".join(page.sentences)):
        return
    others = _years(page.sentences[target])
    if others:
        raise RowRefused(
            "label_doubted",
            f"labelled {row.label.value}, but the claim says {min(years)} and {page.title!r} says {min(others)}",
        )


def _years(text: str) -> set[str]:
    return {word for word in list_words(text) if len(word) == 4 and word.isdigit() and "1000" <= word <= "2100"}
