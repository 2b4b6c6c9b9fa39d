"""The committed examples: true to their sources and to the knowledge source, balanced, and without a shortcut."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.domain.claims import Verdict
from app.domain.corpora import CorpusPage
from app.domain.trajectories import ActionName, Evidence, Step, Trajectory, parse_action
from app.ingest.child import ingest
from app.knowledge.base import SENTENCES_SHOWN, KnowledgeExplorer
from app.knowledge.building import build_corpus
from app.knowledge.memory import MemoryKnowledge
from examples import generate

EXAMPLES = Path(generate.__file__).parent
SPLITS = ("train", "heldout")
ROWS_BY_SPLIT = {
    split: [json.loads(line) for line in (EXAMPLES / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    for split in SPLITS
}
ROWS = [row for split in SPLITS for row in ROWS_BY_SPLIT[split]]


def trajectory(row: dict[str, Any]) -> Trajectory:
    steps = (Step.model_validate({**step, "action": parse_action(step["action"])}) for step in row["steps"])
    evidence = (Evidence(page=page, sentence=sentence) for page, sentence in row["evidence"])
    return Trajectory(claim=row["claim"], steps=tuple(steps), evidence=tuple(evidence))


def pages_opened(row: dict[str, Any], source: MemoryKnowledge) -> list[str]:
    searched = [parse_action(step["action"]) for step in row["steps"]]
    found = [source.search(action.argument).page for action in searched if action.name is ActionName.SEARCH]
    return [page.title for page in found if page]


@pytest.fixture(scope="module")
def corpus() -> dict[str, CorpusPage]:
    lines = (EXAMPLES / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    pages = [CorpusPage.model_validate_json(line) for line in lines]
    assert len({page.title for page in pages}) == len(pages)
    return {page.title: page for page in pages}


@pytest.fixture(scope="module")
def source(corpus: dict[str, CorpusPage]) -> Iterator[MemoryKnowledge]:
    knowledge = MemoryKnowledge(corpus.values())
    yield knowledge
    knowledge.close()


def test_the_committed_files_are_what_the_sources_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0
    assert "accuracy on the held-out claims" in capsys.readouterr().out


def test_a_check_fails_when_a_file_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in EXAMPLES.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "train.jsonl").write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr(generate, "HERE", tmp_path)
    assert generate.main(["--check"]) == 1
    assert "train.jsonl: not what the sources give" in capsys.readouterr().out


def test_there_are_enough_pages_and_claims(corpus: dict[str, CorpusPage]) -> None:
    assert len(corpus) >= 66
    assert len(ROWS) >= 330
    assert len(ROWS_BY_SPLIT["heldout"]) >= 60
    assert len({row["claim"] for row in ROWS}) == len(ROWS)


def test_pages_are_short_and_go_on_past_what_a_search_shows(corpus: dict[str, CorpusPage]) -> None:
    for page in corpus.values():
        assert 5 <= len(page.sentences) <= 9, page.title
        assert len(" ".join(page.sentences[:SENTENCES_SHOWN]).split()) <= 45, page.title
    assert sum(len(page.sentences) > SENTENCES_SHOWN for page in corpus.values()) > len(corpus) / 2


@pytest.mark.parametrize("split", SPLITS)
def test_the_verdicts_are_balanced_from_the_first_lines_on(split: str) -> None:
    labels = [row["label"] for row in ROWS_BY_SPLIT[split]]
    for end in range(3, len(labels) + 1, 3):
        assert set(Counter(labels[:end]).values()) == {end // 3}
    assert set(labels) == set(Verdict)


@pytest.mark.parametrize("split", SPLITS)
def test_most_episodes_search_once_and_the_other_kinds_are_there(split: str) -> None:
    rows = ROWS_BY_SPLIT[split]
    shapes = Counter(tuple(action.split("[")[0] for action in actions) for actions in map(actions_of, rows))
    assert 0.6 <= shapes["Search", "Finish"] / len(rows) <= 0.75
    assert shapes["Search", "Lookup", "Finish"] / len(rows) >= 0.15
    assert shapes["Search", "Search", "Finish"] / len(rows) >= 0.1
    assert shapes.total() == sum(sorted(shapes.values())[-3:])


def actions_of(row: dict[str, Any]) -> list[str]:
    return [step["action"] for step in row["steps"]]


def test_no_held_out_page_is_read_in_training(source: MemoryKnowledge) -> None:
    opened = {
        split: {page for row in rows for page in pages_opened(row, source)} for split, rows in ROWS_BY_SPLIT.items()
    }
    assert not opened["train"] & opened["heldout"]
    assert len(opened["train"]) >= 40
    assert len(opened["heldout"]) >= 20


@pytest.mark.parametrize("row", ROWS, ids=[row["claim"] for row in ROWS])
def test_a_row_reads_what_the_knowledge_source_answers(
    row: dict[str, Any], source: MemoryKnowledge, corpus: dict[str, CorpusPage]
) -> None:
    judged = trajectory(row)
    assert judged.verdict == row["label"]
    assert judged.steps[0].action.argument in judged.claim

    reading = KnowledgeExplorer(source)
    for step in judged.steps[:-1]:
        act = reading.search if step.action.name is ActionName.SEARCH else reading.lookup
        assert step.observation == act(step.action.argument).text
    assert reading.page is not None

    assert len(judged.evidence) == (0 if judged.verdict is Verdict.NOT_ENOUGH_INFO else 1)
    for sentence in judged.evidence:
        assert sentence.page == reading.page.title
        assert judged.steps[-2].observation is not None
        assert corpus[sentence.page].sentences[sentence.sentence] in judged.steps[-2].observation


@pytest.mark.parametrize("split", SPLITS)
def test_claims_come_in_threes_that_differ_in_the_name_of_their_page_only(split: str) -> None:
    pages = generate.read_pages(generate.read_wordings().kinds)
    names = sorted((name for page in pages for name in (page.name, page.longer_name)), key=len, reverse=True)
    seen: dict[str, Counter[str]] = {}
    for row in ROWS_BY_SPLIT[split]:
        name = next(name for name in names if name.lower() in row["claim"].lower())
        wording = row["claim"].lower().replace(name.lower(), "…")
        seen.setdefault(wording, Counter())[row["label"]] += 1
    for wording, labels in seen.items():
        assert len(labels) == 3, wording
        assert len(set(labels.values())) == 1, wording


def test_judges_that_see_the_claim_alone_stay_near_chance() -> None:
    found = generate.figures(ROWS_BY_SPLIT["train"], ROWS_BY_SPLIT["heldout"])
    blind = {judge: accuracy for judge, accuracy in found.items() if judge != "word overlap"}
    assert len(blind) == 3
    assert max(blind.values()) <= 0.45


def test_whether_to_read_on_follows_from_the_attribute() -> None:
    kinds = generate.read_wordings().kinds
    for page in generate.read_pages(kinds):
        for key, fact in page.facts.items():
            word = kinds[page.kind].attributes[key].lookup
            assert (fact.sentence >= SENTENCES_SHOWN) == (word is not None), (page.page.title, key)
            if word is not None:
                found = [i for i, text in enumerate(page.page.sentences) if word in text]
                assert found == [fact.sentence], (page.page.title, key)


def test_a_lookup_word_can_be_copied_from_the_claim() -> None:
    for kind in generate.read_wordings().kinds.values():
        for attribute in kind.attributes.values():
            assert all((attribute.lookup or "") in wording for wording in attribute.claims)


def test_not_enough_info_is_true_of_the_whole_page_and_not_only_of_what_was_read(source: MemoryKnowledge) -> None:
    pages = generate.read_pages(generate.read_wordings().kinds)
    kind_of = {page.page.title: page.kind for page in pages}
    values = {kind: {f.value for p in pages if p.kind == kind for f in p.facts.values()} for kind in kind_of.values()}
    for row in ROWS:
        if row["label"] == Verdict.NOT_ENOUGH_INFO:
            page = last_page(row, source)
            claimed = max((v for v in values[kind_of[page.title]] if whole(v, row["claim"])), key=len)
            assert not any(whole(claimed, sentence) for sentence in page.sentences), row["claim"]


def whole(value: str, text: str) -> bool:
    return re.search(rf"(?<![\w,]){re.escape(value)}(?![\w,])", text) is not None


def last_page(row: dict[str, Any], source: MemoryKnowledge) -> CorpusPage:
    page = source.search(pages_opened(row, source)[-1]).page
    assert page is not None
    return page


@pytest.mark.parametrize("split", SPLITS)
def test_an_upload_of_it_is_kept_whole_without_a_finding(split: str, tmp_path: Path) -> None:
    result = ingest(EXAMPLES / f"{split}.jsonl", f"{split}.jsonl", None, tmp_path)
    assert result.rows == len(ROWS_BY_SPLIT[split])
    assert not result.report.findings


def test_the_corpus_is_kept_whole_without_a_finding(corpus: dict[str, CorpusPage], tmp_path: Path) -> None:
    with (EXAMPLES / "corpus.jsonl").open("rb") as lines:
        report = build_corpus(lines, tmp_path / "corpus.db")
    assert report.pages == len(corpus)
    assert not report.findings
