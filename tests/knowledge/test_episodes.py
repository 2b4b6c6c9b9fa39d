"""Episodes played for labelled claims: Actions that lead to the evidence, Observations that a replay gives again."""

import json
from collections import Counter
from pathlib import Path

import pytest

from app.domain.claims import Verdict, check_claim
from app.domain.corpora import CorpusPage
from app.domain.datasets import canonical_line, read_canonical
from app.domain.quotations import find_quotations
from app.domain.thoughts import build_skeleton
from app.domain.trajectories import ActionName, Evidence, Trajectory
from app.knowledge import KnowledgeExplorer, KnowledgeSource
from app.knowledge.episodes import Episode, LabelledClaim, RowRefused
from app.knowledge.memory import MemoryKnowledge
from app.knowledge.regrounding import reground, replay
from tests.conftest import ROOT

LIGHT = CorpusPage(
    title="Arden Point Light (Fennmark)",
    sentences=(
        "Arden Point Light is a lighthouse on the north coast of Fennmark.",
        "It was built in 1871 by Mira Holt.",
        "The tower is 31 metres tall.",
        "Its lamp was electrified in 1932.",
        "A storm broke the lamp in 1954.",
        "Nobody has lived there since 1988.",
        'The LAMP is now in a museum, called "The Eye".',
    ),
)
HOLT = CorpusPage(title="Mira Holt", sentences=("Mira Holt was an engineer. ", "She built three lighthouses."))
SUPPORTS, REFUTES, NEI = Verdict.SUPPORTS, Verdict.REFUTES, Verdict.NOT_ENOUGH_INFO


@pytest.fixture
def source() -> KnowledgeSource:
    return MemoryKnowledge((LIGHT, HOLT))


def play(
    source: KnowledgeSource, claim: str, label: Verdict, page: str | None = LIGHT.title, *evidence: int, seed: int = 1
) -> Trajectory:
    found = tuple(Evidence(page=LIGHT.title, sentence=number) for number in evidence)
    return Episode(source, LabelledClaim(claim, label, page, found), seed).play()


def actions(trajectory: Trajectory) -> list[str]:
    return [str(step.action) for step in trajectory.steps]


def test_it_opens_the_page_and_quotes_the_evidence(source: KnowledgeSource) -> None:
    made = play(source, "Mira Holt built Arden Point Light.", SUPPORTS, LIGHT.title, 1)
    assert actions(made) == ["Search[Arden Point Light]", "Finish[SUPPORTS]"]
    assert made.steps[0].observation == " ".join(LIGHT.sentences[:5])
    assert find_quotations(made.steps[-1].thought, [LIGHT.sentences[1]]) == [LIGHT.sentences[1]]
    assert made.steps[-1].thought.endswith("Mira Holt built Arden Point Light.")
    assert (made.page, made.evidence) == (LIGHT.title, (Evidence(page=LIGHT.title, sentence=1),))


def test_it_looks_up_what_the_first_sentences_do_not_show(source: KnowledgeSource) -> None:
    made = play(source, "The lamp of Arden Point Light was lost at sea.", REFUTES, LIGHT.title, 6)
    assert actions(made)[1:] == ["Lookup[lamp]"] * 3 + ["Finish[REFUTES]"]
    assert made.steps[3].observation == f"(Result 3 / 3) {LIGHT.sentences[6]}"
    assert LIGHT.sentences[6] in made.steps[-1].thought


def test_the_nearest_sentence_is_chosen_where_no_evidence_is_named(source: KnowledgeSource) -> None:
    made = play(source, "The tower of Arden Point Light has 31 metres.", SUPPORTS)
    assert f'"{LIGHT.sentences[2]}"' in made.steps[-1].thought
    undecided = play(source, "The tower of Arden Point Light was painted red.", NEI)
    assert f'"{LIGHT.sentences[2]}"' in undecided.steps[-1].thought


def test_the_page_is_the_one_that_the_claim_names_where_the_row_does_not(source: KnowledgeSource) -> None:
    made = play(source, "The engineer Mira Holt built Arden Point Light.", SUPPORTS, None)
    assert (made.page, actions(made)[0]) == (HOLT.title, "Search[Mira Holt]")


def test_a_quotation_of_the_claim_is_none_of_the_thought(source: KnowledgeSource) -> None:
    made = play(source, 'The tower of Arden Point Light is called "the Needle".', NEI)
    assert find_quotations(made.steps[-1].thought, [LIGHT.sentences[2]]) == [LIGHT.sentences[2]]
    assert "'the Needle'" in made.steps[-1].thought


def test_a_claim_without_a_word_to_look_up_is_judged_by_what_was_shown(source: KnowledgeSource) -> None:
    made = play(source, "Arden Point Light is a museum piece.", NEI)
    assert actions(made)[1:] == ["Lookup[museum]", "Finish[NOT ENOUGH INFO]"]
    made = play(source, "Arden Point Light is admired.", NEI)
    assert actions(made)[1:] == ["Finish[NOT ENOUGH INFO]"]


def test_a_name_inside_a_word_is_no_search() -> None:
    page = CorpusPage(title="It (film)", sentences=("It is a film of 1990.",))
    made = Episode(
        MemoryKnowledge([page]), LabelledClaim("Smith titled a film of 1990.", SUPPORTS, page.title), 2
    ).play()
    assert actions(made)[0] == "Search[It (film)]"


def test_some_episodes_begin_with_a_miss_and_recover(source: KnowledgeSource) -> None:
    made = [play(source, "Mira Holt built Arden Point Light.", SUPPORTS, LIGHT.title, 1, seed=n) for n in range(200)]
    missed = [one for one in made if one.steps[0].observation and one.steps[0].observation.startswith("Could not find")]
    assert 3 < len(missed) < 40
    assert all(f"Search[{LIGHT.title}]" in actions(one) for one in missed)


@pytest.mark.parametrize(
    ("code", "claim", "label", "page", "evidence"),
    [
        ("page_not_named", "It is tall.", SUPPORTS, None, ()),
        ("page_not_named", "It is tall.", SUPPORTS, None, (1,)),
        ("evidence_elsewhere", "Mira Holt built a light.", SUPPORTS, None, (1,)),
        ("unwritable", f"Arden Point Light is {'very ' * 90}old.", SUPPORTS, LIGHT.title, (1,)),
        ("page_missing", "It is tall.", SUPPORTS, "Nowhere", ()),
        ("evidence_missing", "It is tall.", SUPPORTS, LIGHT.title, (7,)),
        ("evidence_elsewhere", "She is tall.", SUPPORTS, HOLT.title, (1,)),
        ("evidence_unreachable", "Arden Point Light is old.", SUPPORTS, LIGHT.title, (5,)),
        ("label_doubted", "Arden Point Light was built by Mira Holt in 1899.", SUPPORTS, LIGHT.title, (1,)),
        ("label_doubted", "Arden Point Light was built by Mira Holt in 1899.", NEI, LIGHT.title, ()),
    ],
)
def test_what_cannot_be_shown_is_refused(
    source: KnowledgeSource, code: str, claim: str, label: Verdict, page: str | None, evidence: tuple[int, ...]
) -> None:
    with pytest.raises(RowRefused) as refused:
        play(source, claim, label, page, *evidence)
    assert refused.value.code == code


def example_claims() -> tuple[list[LabelledClaim], KnowledgeSource]:
    pages = [CorpusPage.model_validate(json.loads(line)) for line in _lines("corpus.jsonl")]
    rows = [read_canonical(canonical_line(_trajectory(json.loads(line)))) for line in _lines("train.jsonl")]
    claims = []
    for row in rows:
        searched = [step.action.argument for step in row.steps if step.action.name is ActionName.SEARCH]
        claims.append(LabelledClaim(check_claim(row.claim), row.verdict, searched[-1], row.evidence))
    return claims, MemoryKnowledge(pages)


def _lines(name: str) -> list[str]:
    return (Path(ROOT) / "examples" / name).read_text("utf-8").splitlines()


def _trajectory(row: dict[str, object]) -> Trajectory:
    from app.domain.datasets import Columns, SourceRow
    from app.domain.rows import read_row

    read = read_row(SourceRow(1, row), Columns()).trajectory
    assert read is not None
    return read


def test_the_examples_can_be_synthesised_and_replayed() -> None:
    claims, source = example_claims()
    made: list[Trajectory] = []
    refused: Counter[str] = Counter()
    for claim in claims:
        try:
            made.append(Episode(source, claim, 7).play())
        except RowRefused as reason:
            refused[reason.code] += 1
    assert len(made) > 0.9 * len(claims), refused
    for one in made:
        assert canonical_line(reground(one, replay(one, source))) == canonical_line(one)
    explorer = KnowledgeExplorer(source)
    for step in made[0].steps[:-1]:
        found = explorer.search(step.action.argument)
        assert step.action.name is not ActionName.SEARCH or step.observation == found.text
    skeletons = Counter(
        build_skeleton(step.thought, step.action.argument, one.claim) for one in made for step in one.steps
    )
    assert len(skeletons) > 100
    assert max(skeletons.values()) / skeletons.total() < 0.03


def test_the_first_step_does_not_tell_the_verdict() -> None:
    """Another label, with or without a page and evidence, gives the same first Thought and Action."""
    claims, source = example_claims()
    for claim in claims[:60]:
        firsts = set()
        for label, evidence in ((SUPPORTS, claim.evidence), (REFUTES, ()), (NEI, ()), (NEI, claim.evidence)):
            try:
                step = Episode(source, LabelledClaim(claim.claim, label, None, evidence), 3).play().steps[0]
            except RowRefused:
                continue
            firsts.add((step.thought, str(step.action)))
        assert len(firsts) <= 1
