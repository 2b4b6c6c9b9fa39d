"""Makes the example corpus and dataset from `pages.txt` and `wordings.json`, the same way every time.

    python examples/generate.py            write corpus.jsonl, train.jsonl, heldout.jsonl; print the figures
    python examples/generate.py --check    write nothing; fail unless the files are what would be written

A page is written by hand. A fact is marked where it stands, as in `It flows into [mouth: the Black Sea].`; the
mark goes, the sentence stays. `wordings.json` says how claims about each attribute of a kind of page are worded.

Claims are made in threes. A trio has one wording and one value, and three pages of one kind: the page that
states the value (SUPPORTS), a page that states another value of the same attribute (REFUTES), and a page that
does not state the attribute (NOT ENOUGH INFO). The three claims differ in the name of their page only, and
held-out pages are never seen in training. So the claim alone gives nothing away: neither its words nor its
numbers, length, negation or subject.

An attribute with a `lookup` word stands behind the sentences that a Search shows, on every page that has it, so
whether to read further follows from the attribute and never from the verdict. Some trios name their pages at
greater length (`the river Rhine`), so that the first Search misses. Every Observation is what `app.knowledge`,
which also answers at serving time, returns.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from app.domain.claims import Verdict
from app.domain.corpora import CorpusPage
from app.domain.trajectories import Action, ActionName, Evidence, Step, Trajectory
from app.knowledge.base import KnowledgeExplorer
from app.knowledge.memory import MemoryKnowledge

HERE = Path(__file__).parent
SEED = 7


@dataclass(frozen=True)
class Quota:
    """How many trios a split gets: read at once, found after a miss, found by a Lookup."""

    plain: int
    miss: int
    lookup: int


QUOTAS = {"train": Quota(plain=54, miss=10, lookup=16), "heldout": Quota(plain=22, miss=4, lookup=6)}


class Attribute(BaseModel):
    """Something that pages of a kind may state: `topic` names it in a thought, `lookup` finds it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    topic: str
    claims: tuple[str, ...]
    lookup: str | None = None


class Kind(BaseModel):
    """Pages that share their attributes; `called` makes the longer name that no page has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nouns: tuple[str, ...]
    called: str
    attributes: dict[str, Attribute]


class Wordings(BaseModel):
    """`wordings.json`: the kinds of page, and what a thought says by its place in a trajectory or its verdict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kinds: dict[str, Kind]
    thoughts: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Fact:
    value: str
    sentence: int


@dataclass(frozen=True)
class SourcePage:
    """A page of `pages.txt`: claims call it `name`, and `facts` maps an attribute to what it states."""

    page: CorpusPage
    kind: str
    split: str
    name: str
    longer_name: str
    facts: dict[str, Fact]


@dataclass(frozen=True)
class Trio:
    """Three claims in one: the same wording and value about three pages."""

    attribute: str
    wording: str
    value: str
    pages: tuple[tuple[Verdict, SourcePage], ...]


Row = dict[str, Any]
T = TypeVar("T")


# --- reading the sources -------------------------------------------------------------------


def read_wordings() -> Wordings:
    return Wordings.model_validate_json((HERE / "wordings.json").read_text(encoding="utf-8"))


def read_pages(kinds: Mapping[str, Kind]) -> list[SourcePage]:
    blocks = (HERE / "pages.txt").read_text(encoding="utf-8").strip().split("\n\n")
    return [_source_page(block.split("\n"), kinds) for block in blocks]


_FACT = re.compile(r"\[(\w+): ([^\]]+)\]")


def _source_page(lines: Sequence[str], kinds: Mapping[str, Kind]) -> SourcePage:
    title, noun, split, *more = (field.strip() for field in lines[0].removeprefix("#").split("|"))
    aliases = [field.removeprefix("aka ") for field in more if field.startswith("aka ")]
    name = next((field for field in more if not field.startswith("aka ")), title)
    kind = next(key for key, kind in kinds.items() if noun in kind.nouns)
    marks = [(i, mark) for i, line in enumerate(lines[1:]) for mark in _FACT.finditer(line)]
    return SourcePage(
        page=CorpusPage(
            title=title,
            sentences=tuple(_FACT.sub(r"\2", line) for line in lines[1:]),
            aliases=tuple(aliases),
        ),
        kind=kind,
        split=split,
        name=name,
        longer_name=kinds[kind].called.format(noun=noun, title=name.removeprefix("the ")),
        facts={mark[1]: Fact(mark[2], i) for i, mark in marks},
    )


# --- drawing trios -------------------------------------------------------------------------


def draw_trios(
    pages: Sequence[SourcePage], kinds: Mapping[str, Kind], quota: Quota, rng: random.Random
) -> dict[str, list[Trio]]:
    """Trios about `pages` by the episode that they call for; the kinds take turns."""
    shown: list[list[Trio]] = []
    deep: list[list[Trio]] = []
    for name, kind in kinds.items():
        peers = [page for page in pages if page.kind == name]
        for found, further in ((shown, False), (deep, True)):
            keys = [key for key, attribute in kind.attributes.items() if bool(attribute.lookup) == further]
            trios = [trio for key in keys for trio in _trios(key, kind.attributes[key], peers, rng)]
            found.append(rng.sample(trios, len(trios)))
    turns = _take_turns(shown)
    return {
        "plain": turns[quota.miss : quota.miss + quota.plain],
        "miss": turns[: quota.miss],
        "lookup": _take_turns(deep)[: quota.lookup],
    }


def _trios(key: str, attribute: Attribute, peers: Sequence[SourcePage], rng: random.Random) -> list[Trio]:
    stating = [page for page in peers if key in page.facts]
    silent = [page for page in peers if key not in page.facts]
    trios: dict[str, Trio] = {}
    for i, page in enumerate(stating):
        value = page.facts[key].value
        others = [p for p in stating[i + 1 :] + stating[:i] if p.facts[key].value != value]
        if others and silent:
            about = zip(Verdict, (page, others[0], silent[i % len(silent)]), strict=True)
            trios.setdefault(value, Trio(key, rng.choice(attribute.claims), value, tuple(about)))
    return list(trios.values())


def _take_turns(groups: Iterable[Sequence[T]]) -> list[T]:
    return [item for turn in zip_longest(*groups) for item in turn if item is not None]


# --- writing trajectories ------------------------------------------------------------------


class Writer:
    """Turns trios into dataset rows, reading every Observation from the knowledge source."""

    def __init__(self, source: MemoryKnowledge, wordings: Wordings, rng: random.Random) -> None:
        self._source = source
        self._wordings = wordings
        self._rng = rng

    def rows(self, trio: Trio, episode: str) -> list[Row]:
        return [self._row(trio, episode, verdict, page) for verdict, page in trio.pages]

    def _row(self, trio: Trio, episode: str, verdict: Verdict, page: SourcePage) -> Row:
        name = page.longer_name if episode == "miss" else page.name
        claim = trio.wording.format(s=name, v=trio.value)
        claim = claim[0].upper() + claim[1:]
        fact = page.facts.get(trio.attribute)
        evidence = (Evidence(page=page.page.title, sentence=fact.sentence),) if fact else ()
        trajectory = Trajectory(
            claim=claim,
            steps=(*self._reading(trio, episode, page, _as_spelled(name, claim)), self._closing(trio, verdict, page)),
            evidence=evidence,
        )
        return as_row(trajectory)

    def _reading(self, trio: Trio, episode: str, page: SourcePage, asked: str) -> list[Step]:
        reading = KnowledgeExplorer(self._source)
        steps = [self._search(reading, self._think("opening", name=asked), asked)]
        if episode == "miss":
            title = page.page.title
            steps.append(self._search(reading, self._think("recovery", title=title), title))
        attribute = self._wordings.kinds[page.kind].attributes[trio.attribute]
        if attribute.lookup is not None:
            thought = self._think("digging", topic=attribute.topic, word=attribute.lookup)
            seen = reading.lookup(attribute.lookup).text
            action = Action(name=ActionName.LOOKUP, argument=attribute.lookup)
            steps.append(Step(thought=thought, action=action, observation=seen))
        return steps

    def _search(self, reading: KnowledgeExplorer, thought: str, argument: str) -> Step:
        action = Action(name=ActionName.SEARCH, argument=argument)
        return Step(thought=thought, action=action, observation=reading.search(argument).text)

    def _closing(self, trio: Trio, verdict: Verdict, page: SourcePage) -> Step:
        fact = page.facts.get(trio.attribute)
        thought = self._think(
            verdict,
            claimed=trio.value,
            quote=page.page.sentences[fact.sentence].rstrip(".") if fact else "",
            topic=self._wordings.kinds[page.kind].attributes[trio.attribute].topic,
        )
        return Step(thought=thought, action=Action(name=ActionName.FINISH, argument=verdict))

    def _think(self, place: str, **words: str) -> str:
        return self._rng.choice(self._wordings.thoughts[place]).format(**words)


def _as_spelled(name: str, claim: str) -> str:
    """The name without its article, with the capitals that the claim gives it: it can be copied."""
    bare = name.removeprefix("the ")
    start = claim.lower().index(bare.lower())
    return claim[start : start + len(bare)]


def as_row(trajectory: Trajectory) -> Row:
    """A line of the structured dataset format: actions as text, evidence as [title, sentence]."""
    return {
        "claim": trajectory.claim,
        "label": trajectory.verdict.value,
        "steps": [
            {"thought": step.thought, "action": str(step.action), "observation": step.observation}
            for step in trajectory.steps
        ],
        "evidence": [[sentence.page, sentence.sentence] for sentence in trajectory.evidence],
    }


# --- the files -----------------------------------------------------------------------------


def build() -> dict[str, list[Row]]:
    """File name → rows. Verdicts take turns, so the first lines of a split are as balanced as the whole."""
    wordings = read_wordings()
    pages = read_pages(wordings.kinds)
    source = MemoryKnowledge(page.page for page in pages)
    files = {"corpus.jsonl": [_page_row(page.page) for page in pages]}
    for split, quota in QUOTAS.items():
        rng = random.Random(f"{SEED} {split}")
        writer = Writer(source, wordings, rng)
        chosen = [page for page in pages if page.split == split]
        drawn = draw_trios(chosen, wordings.kinds, quota, rng)
        rows = [writer.rows(trio, episode) for episode, trios in drawn.items() for trio in trios]
        by_verdict = [rng.sample(column, len(column)) for column in zip(*rows, strict=True)]
        files[f"{split}.jsonl"] = _take_turns(by_verdict)
    source.close()
    return files


def _page_row(page: CorpusPage) -> Row:
    row: Row = {"title": page.title, "sentences": list(page.sentences)}
    return row | ({"aliases": list(page.aliases)} if page.aliases else {})


def as_text(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- what a claim gives away ---------------------------------------------------------------


def figures(train: Sequence[Row], heldout: Sequence[Row]) -> dict[str, float]:
    """Accuracy on the held-out claims, of three verdicts, of judges that were fitted to the training claims.

    All but `word overlap` see the claim alone and should stay near 0.33. `word overlap` sees which share of the
    claim's words stands in what was read: it shows how far one gets without comparing anything.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline
    from sklearn.tree import DecisionTreeClassifier

    def accuracy(judge: Any, see: Callable[[Row], Any]) -> float:
        seen, labels = [see(row) for row in train], [row["label"] for row in train]
        asked, wanted = [see(row) for row in heldout], [row["label"] for row in heldout]
        return float(judge.fit(seen, labels).score(asked, wanted))

    def words() -> Any:
        return TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+")

    tree = DecisionTreeClassifier(max_depth=4, random_state=SEED)
    return {
        "logistic regression": accuracy(make_pipeline(words(), LogisticRegression()), itemgetter("claim")),
        "naive Bayes": accuracy(make_pipeline(words(), MultinomialNB()), itemgetter("claim")),
        "length, digits, capitals, negation": accuracy(tree, _shape),
        "word overlap": accuracy(tree, _overlap),
    }


def _shape(row: Row) -> list[int]:
    claim = row["claim"]
    denied = re.search(r"\b(not|no|never|nothing|only)\b", claim, re.IGNORECASE)
    counts = [sum(map(test, claim)) for test in (str.isdigit, str.isupper)]
    return [len(claim.split()), len(claim), *counts, int(denied is not None)]


def _overlap(row: Row) -> list[float]:
    read = " ".join(step["observation"] or "" for step in row["steps"])
    words = set(re.findall(r"\w+", row["claim"].lower()))
    return [len(words & set(re.findall(r"\w+", read.lower()))) / len(words)]


def report(files: Mapping[str, Sequence[Row]]) -> str:
    """What the files hold, in lines to print."""
    lines = [f"corpus: {len(files['corpus.jsonl'])} pages"]
    for split in QUOTAS:
        rows = files[f"{split}.jsonl"]
        verdicts = Counter(row["label"] for row in rows)
        actions = Counter(" ".join(step["action"].split("[")[0] for step in row["steps"]) for row in rows)
        lines.append(f"{split}: {len(rows)} claims")
        lines += [f"  {count} {name}" for name, count in (verdicts + actions).most_common()]
    lines.append("accuracy on the held-out claims, without reading a page or (last) without comparing:")
    found = figures(files["train.jsonl"], files["heldout.jsonl"])
    return "\n".join([*lines, *(f"  {accuracy:.2f} {judge}" for judge, accuracy in found.items())])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the example corpus and dataset.")
    parser.add_argument("--check", action="store_true", help="compare with the files, write nothing")
    check = parser.parse_args(arguments).check
    files = build()
    if not check:
        for name, rows in files.items():
            (HERE / name).write_text(as_text(rows), encoding="utf-8")
    print(report(files))
    stale = [name for name, rows in files.items() if not _is_written(name, rows)]
    if stale:
        print(f"{', '.join(stale)}: not what the sources give; run examples/generate.py")
    return 1 if stale else 0


def _is_written(name: str, rows: Iterable[Row]) -> bool:
    path = HERE / name
    return path.exists() and path.read_text(encoding="utf-8") == as_text(rows)


if __name__ == "__main__":
    sys.exit(main())
