"""The grounded loop over a real corpus file, with a scripted model: what each side writes, and what forces Finish."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from app.composition import Services, compose
from app.domain.base_models import BaseModelDescription
from app.domain.claims import Verdict
from app.domain.errors import BusyError, ConflictError, InvalidError, NotFoundError
from app.domain.predictions import Observed, PredictRequest
from app.domain.react import ReactFormat
from app.domain.trajectories import Action, ActionName, Step, Trajectory
from app.generation import GenerationRequest, GenerationResult, ScriptedGenerator
from app.knowledge.base import KnowledgeExplorer
from app.queue import MemoryDoorbell
from app.services.prompt_session import PromptSession
from app.services.react_loop import REPEATED, ReactLoop
from tests.conftest import corpus_jsonl

Script = Callable[[str, GenerationRequest], str]


def plan(*turns: tuple[str, str]) -> Script:
    """A model that thinks and acts as listed, turn by turn: (thought, action)."""

    def script(prompt: str, request: GenerationRequest) -> str:
        number = prompt.count("Thought ")
        thought, action = turns[min(number, len(turns)) - 1]
        if prompt.endswith(f"Thought {number}:"):
            return f" {thought}\n"
        if prompt.endswith(":"):
            return f" {action.split('[')[0]}["
        return action.split("[", 1)[1]

    return script


@pytest.fixture
def ask(services: Services, tmp_path: Path, tiny_cache: Path) -> Iterator[Callable[[Script], Services]]:
    """The deployment with a scripted model behind it, and a corpus of two pages."""
    path = tmp_path / "pages.jsonl"
    path.write_bytes(corpus_jsonl())
    services.corpora.create(path, "pages.jsonl", "pages")
    tokens = services.base_models.tokenization(services.base_models.get(None))
    opened = ExitStack()

    def with_script(script: Script) -> Services:
        generator = ScriptedGenerator(tokens, script)
        served = compose(services.settings, doorbell=MemoryDoorbell(), generator=generator)
        return opened.enter_context(closing(served))

    assert BaseModelDescription.model_validate_json((tiny_cache / "tiny.json").read_text()).name == "tiny"
    with opened:
        yield with_script


def requests_of(served: Services) -> list[GenerationRequest]:
    assert isinstance(served.generator, ScriptedGenerator)
    return served.generator.requests


CLAIM = "The Rhine flows into the North Sea."
STRAIGHT = plan(("Look it up.", "Search[rhine]"), ("It says so.", "Finish[SUPPORTS]"))


def test_the_observation_is_the_corpus_text_and_its_sentences_are_cited(ask: Callable[[Script], Services]) -> None:
    served = ask(STRAIGHT)
    prediction = served.predictions.predict(PredictRequest(claim=CLAIM))
    first = prediction.steps[0].observation
    assert first is not None
    assert first.text == "The Rhine carries trade. The river flows into the North Sea."
    assert (first.page, first.sentences, first.source) == ("Rhine", (0, 1), "corpus")
    assert first.snapshot == served.corpora.get("pages").digest
    assert [(c.page, c.sentence_id) for c in prediction.evidence] == [("Rhine", 0), ("Rhine", 1)]
    assert (prediction.verdict, prediction.grounded, prediction.forced) == (Verdict.SUPPORTS, True, False)
    assert prediction.text == (
        "Thought 1: Look it up.\nAction 1: Search[rhine]\n"
        "Observation 1: The Rhine carries trade. The river flows into the North Sea.\n"
        "Thought 2: It says so.\nAction 2: Finish[SUPPORTS]"
    )


@pytest.mark.parametrize(("least", "withheld"), [(0.0, False), (0.89, False), (0.91, True)])
def test_a_verdict_that_is_not_probable_enough_is_withheld(
    ask: Callable[[Script], Services], least: float, withheld: bool
) -> None:
    """The scripted model's verdict has a probability of 0.9."""
    policy = {"claim": CLAIM, "verdict_policy": {"abstain_below": least}}
    prediction = ask(STRAIGHT).predictions.predict(PredictRequest.model_validate(policy))
    assert prediction.confidence == pytest.approx(0.9)
    assert prediction.steps[-1].action is not None
    assert prediction.steps[-1].action.argument == "SUPPORTS"
    found = (prediction.verdict, prediction.withheld, prediction.abstained)
    nei, supports = Verdict.NOT_ENOUGH_INFO, Verdict.SUPPORTS
    assert found == ((nei, supports, True) if withheld else (supports, None, False))


def test_the_observation_says_that_a_page_does_not_exist(ask: Callable[[Script], Services]) -> None:
    script = plan(("Look it up.", "Search[River Volga]"), ("Nothing there.", "Finish[NOT ENOUGH INFO]"))
    prediction = ask(script).predictions.predict(PredictRequest(claim="The Volga is long."))
    seen = prediction.steps[0].observation
    assert seen is not None
    assert seen.text.startswith("Could not find River Volga. Similar: [")
    assert "Volga" in seen.text
    assert prediction.evidence == ()
    assert prediction.abstained


def test_serving_ids_are_the_training_ids_of_the_same_trajectory(ask: Callable[[Script], Services]) -> None:
    served = ask(STRAIGHT)
    served.predictions.predict(PredictRequest(claim=CLAIM))
    base = served.base_models.get(None)
    encoder = served.base_models.encoder(base, ReactFormat())
    observation = "The Rhine carries trade. The river flows into the North Sea."
    search = Action(name=ActionName.SEARCH, argument="rhine")
    finish = Action(name=ActionName.FINISH, argument="SUPPORTS")
    trajectory = Trajectory(
        claim=CLAIM,
        steps=(
            Step(thought="Look it up.", action=search, observation=observation),
            Step(thought="It says so.", action=finish),
        ),
    )
    trained = encoder.encode(encoder.form.render_trajectory(trajectory)).ids
    *turns, label, branch = [request.prompt for request in requests_of(served)]
    for prompt in (*turns, label):
        assert trained[: len(prompt)] == prompt
    assert branch == encoder.encode(encoder.form.render_verdict_branch(CLAIM, trajectory.steps[:1])).ids


def test_a_claim_and_a_page_that_name_a_control_token_stay_text(
    ask: Callable[[Script], Services], tmp_path: Path
) -> None:
    served = ask(STRAIGHT)
    path = tmp_path / "marked.jsonl"
    path.write_text(json.dumps({"title": "Rhine", "text": "The Rhine </s> carries <s> trade."}))
    served.corpora.create(path, path.name, "marked")
    claim = "The Rhine </s> flows."
    prediction = served.predictions.predict(PredictRequest(claim=claim, corpus="marked"))
    seen = prediction.steps[0].observation
    assert (prediction.claim, seen and seen.text) == (claim, "The Rhine </s> carries <s> trade.")
    tokens = served.base_models.tokenization(served.base_models.get(None))
    for request in requests_of(served):
        bos = () if tokens.bos_id is None else (tokens.bos_id,)
        assert request.prompt[: len(bos)] == bos
        assert not {0, 1, 2} & set(request.prompt[len(bos) :])


def test_the_probabilities_are_scored_before_the_last_thought(ask: Callable[[Script], Services]) -> None:
    served = ask(STRAIGHT)
    prediction = served.predictions.predict(PredictRequest(claim=CLAIM))
    scoring = requests_of(served)[-1]
    text = served.base_models.tokenization(served.base_models.get(None)).decode(scoring.prompt)
    assert text.endswith(
        "Observation 1: The Rhine carries trade. The river flows into the North Sea.\nAction 2: Finish["
    )
    assert (scoring.max_tokens, scoring.logprobs, len(scoring.allowed_token_ids or ())) == (1, 3, 3)
    assert sum(prediction.probabilities.values()) == pytest.approx(1)


def test_lookup_is_offered_only_while_a_page_is_open(ask: Callable[[Script], Services]) -> None:
    script = plan(
        ("Which page?", "Search[Volga]"),
        ("Look closer.", "Lookup[caspian]"),
        ("Found it.", "Finish[SUPPORTS]"),
    )
    served = ask(script)
    prediction = served.predictions.predict(PredictRequest(claim="The Volga flows into the Caspian Sea."))
    offers = [len(r.allowed_token_ids) for r in requests_of(served) if r.allowed_token_ids and not r.logprobs]
    assert offers == [2, 3, 3, 3]
    assert prediction.steps[1].observation is not None
    assert prediction.steps[1].observation.text == "(Result 1 / 1) It flows into the Caspian Sea."


def test_a_repeated_action_is_corrected_once_and_then_finish_is_forced(ask: Callable[[Script], Services]) -> None:
    script = plan(*[("Again.", "Search[Rhine]")] * 5)
    prediction = ask(script).predictions.predict(PredictRequest(claim=CLAIM))
    assert [step.action.name for step in prediction.steps if step.action] == ["Search", "Search", "Finish"]
    assert prediction.steps[1].observation is not None
    assert (prediction.steps[1].observation.text, prediction.steps[1].observation.source) == (REPEATED, "server")
    assert prediction.forced


def test_the_step_cap_forces_finish(ask: Callable[[Script], Services]) -> None:
    script = plan(*[("On.", f"Search[page {n}]") for n in range(9)])
    prediction = ask(script).predictions.predict(PredictRequest(claim=CLAIM, max_steps=3))
    assert len(prediction.steps) == 3
    assert prediction.forced
    assert prediction.steps[-1].action is not None
    assert prediction.steps[-1].action.name == "Finish"


def test_a_thought_that_invents_an_observation_is_cut(ask: Callable[[Script], Services]) -> None:
    script = plan(
        ("I know. Observation 1: It flows into the Black Sea. Thought 2: So false.", "Search[Rhine]"),
        ("It says so.", "Finish[SUPPORTS]"),
    )
    prediction = ask(script).predictions.predict(PredictRequest(claim=CLAIM))
    assert prediction.steps[0].thought == "I know."
    assert "Black Sea" not in prediction.text


def test_every_event_of_the_loop_is_sent_in_order(ask: Callable[[Script], Services]) -> None:
    events = list(ask(STRAIGHT).predictions.stream(PredictRequest(claim=CLAIM)))
    assert [event.event for event in events] == [
        "thought",
        "action",
        "observation",
        "thought",
        "action",
        "prediction",
    ]
    assert isinstance(events[2], Observed)


def test_of_two_predictions_with_one_name_the_first_to_end_gets_it(ask: Callable[[Script], Services]) -> None:
    served = ask(STRAIGHT)
    request = PredictRequest(claim=CLAIM, store=True, name="first")
    slower = served.predictions.stream(request)
    next(slower)
    faster = served.predictions.predict(request)
    with pytest.raises(ConflictError, match="named 'first'"):
        list(slower)
    assert served.stored_predictions.list_predictions(None, 10) == ([faster], False)


def test_a_long_observation_is_trimmed_to_whole_sentences(services: Services, tmp_path: Path) -> None:
    sentences = [f"Sentence number {n} tells of the long river and of nothing else." for n in range(5)]
    path = tmp_path / "long.jsonl"
    path.write_text('{"title": "Long", "sentences": ["' + '", "'.join(sentences) + '"]}')
    services.corpora.create(path, "long.jsonl", "long")
    tokens = services.base_models.tokenization(services.base_models.get(None))
    script = plan(("Look.", "Search[Long]"), ("Done.", "Finish[REFUTES]"))
    narrow = services.settings.model_copy(update={"max_sequence_length": 400})
    with closing(compose(narrow, generator=ScriptedGenerator(tokens, script))) as served:
        seen = served.predictions.predict(PredictRequest(claim="The river is long.")).steps[0].observation
    assert seen is not None
    assert seen.trimmed
    assert 1 <= len(seen.sentences) < 5
    assert seen.text == " ".join(sentences[: len(seen.sentences)])


def test_no_request_exceeds_the_length_that_the_adapter_was_trained_with(
    ask: Callable[[Script], Services], tmp_path: Path
) -> None:
    """Where a Thought may be long, an Observation leaves less room than the next one might take."""
    path = tmp_path / "long.jsonl"
    path.write_text('{"title": "Long", "text": "' + ("The river is long" + " and winds on" * 11 + ". ") * 6 + '"}')
    served = ask(plan(("Look.", "Search[Long]"), ("So.", "Finish[SUPPORTS]")))
    served.corpora.create(path, "long.jsonl", "long")
    _, source = served.corpora.open("long")
    encoder = served.base_models.encoder(served.base_models.get(None), ReactFormat())
    for limit in range(510, 620, 10):
        session = PromptSession(served.generator, encoder, "model", temperature=0, top_p=1, max_thought_tokens=300)
        list(ReactLoop(session, KnowledgeExplorer(source), CLAIM, 6, limit).run())
        assert max(len(request.prompt) + request.max_tokens for request in requests_of(served)) <= limit


def test_votes_over_samples(ask: Callable[[Script], Services]) -> None:
    def script(prompt: str, request: GenerationRequest) -> str:
        verdict = "REFUTES" if request.seed == 1 else "SUPPORTS"
        return plan(("Look.", "Search[Rhine]"), ("So.", f"Finish[{verdict}]"))(prompt, request)

    prediction = ask(script).predictions.predict(PredictRequest(claim=CLAIM, samples=3))
    assert prediction.probability_method == "vote"
    assert prediction.verdict is Verdict.SUPPORTS
    assert prediction.confidence == pytest.approx(2 / 3, abs=1e-6)


def test_ungrounded_is_marked_and_its_observations_are_the_models(ask: Callable[[Script], Services]) -> None:
    def script(prompt: str, request: GenerationRequest) -> str:
        first = " I know.\nAction 1: Search[Rhine]\nObservation 1: It ends in Paris."
        return f"{first}\nThought 2: So.\nAction 2: Finish[REFUTES]"

    prediction = ask(script).predictions.predict(PredictRequest(claim=CLAIM, mode="ungrounded"))
    assert not prediction.grounded
    assert prediction.steps[0].observation is not None
    assert prediction.steps[0].observation.source == "model"
    assert prediction.verdict is Verdict.REFUTES
    assert prediction.evidence == ()


def test_without_a_corpus_the_error_names_the_way_out(services: Services) -> None:
    with pytest.raises(InvalidError, match="POST /corpora") as caught:
        services.predictions.predict(PredictRequest(claim=CLAIM))
    assert caught.value.code == "no_corpus"


def test_without_a_default_corpus_the_error_names_the_corpora(ask: Callable[[Script], Services]) -> None:
    served = ask(STRAIGHT)
    with served.database.write() as unit:
        unit.aliases.drop("corpus", served.corpora.get("pages").id)
    with pytest.raises(InvalidError, match=r"name one \(pages\), or POST /corpora/pages/promote") as caught:
        served.predictions.predict(PredictRequest(claim=CLAIM))
    assert caught.value.code == "no_corpus"
    served.corpora.promote("pages")
    assert served.predictions.predict(PredictRequest(claim=CLAIM)).grounded


def test_an_unknown_adapter_is_named(services: Services) -> None:
    with pytest.raises(NotFoundError, match="adp_nowhere"):
        services.predictions.predict(PredictRequest(claim=CLAIM, adapter="adp_nowhere"))


def test_full_slots_are_busy_and_a_slot_is_released(ask: Callable[[Script], Services]) -> None:
    served = ask(STRAIGHT)
    slots = served.settings.prediction_slots * 3 // 4
    open_streams = [served.predictions.stream(PredictRequest(claim=CLAIM)) for _ in range(slots)]
    for stream in open_streams:
        next(stream)
    with pytest.raises(BusyError):
        served.predictions.predict(PredictRequest(claim=CLAIM))
    open_streams.pop().close()
    assert served.predictions.predict(PredictRequest(claim=CLAIM)).verdict is Verdict.SUPPORTS


def test_a_token_that_crosses_the_stop_is_replaced_and_counted(services: Services, tmp_path: Path) -> None:
    path = tmp_path / "pages.jsonl"
    path.write_bytes(corpus_jsonl())
    services.corpora.create(path, "pages.jsonl", "pages")
    tokens = services.base_models.tokenization(services.base_models.get(None))

    class Crossing(ScriptedGenerator):
        """Ends a Thought with one made-up token that holds its last word and the newline."""

        def generate(self, request: GenerationRequest) -> GenerationResult:
            answer = super().generate(request)
            if request.stop == ("\n",):
                return answer.model_copy(update={"ids": (*tokens.encode(" Look it"), tokens.eos_id)})
            return answer

    with closing(compose(services.settings, generator=Crossing(tokens, STRAIGHT))) as served:
        prediction = served.predictions.predict(PredictRequest(claim=CLAIM))
    assert prediction.usage.crossed_stops == 2
    assert prediction.steps[0].thought == "Look it up."
