"""Evaluation jobs, run by a runner over a scripted model: judged once, resumed, paused, cancelled, reported."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.composition import Services, compose
from app.domain.adapters import Adapter
from app.domain.claims import Verdict
from app.domain.errors import ConflictError, InvalidError, NotFoundError, UnavailableError, VerituneError
from app.domain.evaluations import EvaluationPlan, EvaluationProgress, EvaluationReport, EvaluationSpec
from app.domain.jobs import Event, Job, JobAction, JobStatus
from app.domain.predictions import PredictRequest
from app.domain.specs import TrainSpec
from app.generation.base import GenerationRequest
from app.generation.scripted import ScriptedGenerator
from app.services import evaluations
from tests.api.conftest import lease, make_adapter, manifest_of, write_adapter
from tests.conftest import corpus_jsonl, dataset_jsonl
from worker import evaluation_attempt
from worker.supervisor import Supervisor

CLAIMS = 12
SUPPORTS = Verdict.SUPPORTS


def judges_by_reading(prompt: str, request: GenerationRequest) -> str:
    """Searches for the river that the claim names, and supports a claim of which it read more than half."""
    claim = re.findall(r"Claim: (.*)", prompt)[-1]
    page = claim.split()[1]
    number = prompt.count("Thought ")
    if prompt.endswith(f"Thought {number}:"):
        return f" I look up {page}.\n" if number == 1 else " The page tells enough.\n"
    if prompt.endswith(":") and request.logprobs is None:
        return " Search[" if number == 1 else " Finish["
    if prompt.endswith("Search["):
        return f"{page}]"
    read = " ".join(re.findall(r"Observation \d+:(.*)", prompt)).lower()
    shared = [word for word in claim.lower().rstrip(".").split() if word in read]
    if not read.strip():
        return "NOT ENOUGH INFO"
    return "SUPPORTS" if len(shared) > len(claim.split()) / 2 else "REFUTES"


class Counting(ScriptedGenerator):
    """Stops the deployment's worker after `limit` requests, as a killed runner would."""

    fault: VerituneError | None = None
    limit: int | None = None
    stop: Supervisor | None = None

    def generate(self, request):  # type: ignore[no-untyped-def]
        if self.fault is not None:
            raise self.fault
        answer = super().generate(request)
        if self.limit is not None and len(self.requests) >= self.limit and self.stop:
            self.stop.leave()
        return answer


@pytest.fixture
def generator(services: Services) -> Counting:
    return Counting(services.base_models.tokenization(services.base_models.get(None)), judges_by_reading)


@pytest.fixture
def served(services: Services, generator: Counting, tmp_path: Path) -> Iterator[Services]:
    composed = compose(services.settings, doorbell=services.doorbell, generator=generator)
    for name, content in (("rows.jsonl", dataset_jsonl(CLAIMS)), ("pages.jsonl", corpus_jsonl())):
        (tmp_path / name).write_bytes(content)
    composed.datasets.create(tmp_path / "rows.jsonl", "rows.jsonl", None, "rows", {})
    composed.corpora.create(tmp_path / "pages.jsonl", "pages.jsonl", "pages")
    yield composed
    composed.close()


def submit(services: Services, **spec: object) -> Job:
    asked = EvaluationSpec.model_validate({"dataset": "rows", "corpus": "pages", **spec})
    return services.jobs.get(services.evaluations.submit(asked))


def run(services: Services) -> bool:
    return Supervisor(services, "runner-1", ("cpu",)).work()


def report_of(services: Services, job: Job) -> EvaluationReport:
    return EvaluationReport.model_validate_json(b"".join(services.artifacts.stream(job.id, "report.json")))


def test_a_model_that_reads_is_told_from_one_that_does_not(served: Services) -> None:
    job = submit(served, name="first")
    assert (job.kind, job.status, job.progress) == ("evaluate", "queued", EvaluationProgress(total=3 * CLAIMS))
    assert run(served)
    job = served.jobs.get("first")
    assert (job.status, job.error) == (JobStatus.SUCCEEDED, None)
    assert isinstance(job.progress, EvaluationProgress)
    assert job.progress.done == 3 * CLAIMS
    report = report_of(served, job)
    plain, claim_only, shuffled = report.runs
    assert [one.run.key for one in report.runs] == ["tiny", "tiny/claim_only", "tiny/shuffled_pages"]
    assert plain.accuracy.value > claim_only.accuracy.value
    assert (claim_only.page_found, claim_only.abstained) == (0.0, 1.0)
    assert plain.page_found == 1.0
    assert shuffled.page_found == 0.0
    assert plain.invented_observations == 0
    assert claim_only.confusion[SUPPORTS][Verdict.NOT_ENOUGH_INFO] == report.labels[SUPPORTS] == CLAIMS / 2
    assert report.baselines.majority == 0.5
    page = b"".join(served.artifacts.stream(job.id, "report.html")).decode()
    assert page.count("<svg") == 3
    assert "tiny, claim only" in page
    answers = b"".join(served.artifacts.stream(job.id, "answers.jsonl")).splitlines()
    assert len(answers) == 3 * CLAIMS
    assert json.loads(answers[0])["answer"]["steps"]


def test_an_evaluation_that_was_stopped_judges_only_the_rest_and_reports_the_same(
    served: Services, generator: Counting
) -> None:
    whole = submit(served, name="whole", controls=[])
    assert run(served)
    calls = len(generator.requests)
    generator.requests.clear()

    stopped = submit(served, name="stopped", controls=[])
    generator.limit, generator.stop = calls // 3, Supervisor(served, "runner-1", ("cpu",))
    assert generator.stop.work()
    assert served.jobs.get(stopped.id).status is JobStatus.QUEUED
    generator.limit = None
    with served.database.read() as unit:
        stored = len(unit.evaluation_answers.list_answers(stopped.id))
    assert 0 < stored < CLAIMS
    generator.requests.clear()
    assert run(served)
    assert len(generator.requests) == calls * (CLAIMS - stored) // CLAIMS
    assert numbers(report_of(served, stopped)) == numbers(report_of(served, whole))


def numbers(report: EvaluationReport) -> object:
    """All that does not depend on the clock, or on the job's name."""
    document = report.model_dump(exclude={"job", "name"})
    return [{key: value for key, value in run.items() if key != "seconds"} for run in document.pop("runs")], document


@pytest.mark.parametrize(
    ("action", "ends", "calls"), [(JobAction.PAUSE, JobStatus.PAUSED, True), (JobAction.CANCEL, "cancelled", False)]
)
def test_a_waiting_evaluation_is_paused_and_cancelled(
    served: Services, action: JobAction, ends: str, calls: bool
) -> None:
    job = submit(served)
    served.jobs.request_action(job.id, action)
    assert not run(served)
    assert served.jobs.get(job.id).status == ends
    if calls:
        served.jobs.request_action(job.id, JobAction.RESUME)
        assert run(served)
        assert served.jobs.get(job.id).status is JobStatus.SUCCEEDED


def test_a_corpus_that_was_deleted_meanwhile_fails_the_job_in_words(served: Services) -> None:
    job = submit(served)
    served.corpora.delete("pages")
    assert run(served)
    job = served.jobs.get(job.id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error.code == "unknown_corpus"


def test_what_is_not_there_is_refused_at_once(served: Services) -> None:
    submit(served, name="taken")
    with pytest.raises(ConflictError):
        submit(served, name="taken")
    for spec, wanted in (
        ({"dataset": "none"}, NotFoundError),
        ({"corpus": "none"}, NotFoundError),
        ({"adapters": ["none"]}, NotFoundError),
        ({"base_model": "none"}, InvalidError),
        ({"split": "test"}, InvalidError),
    ):
        with pytest.raises(wanted):
            submit(served, **spec)


def test_only_the_chosen_claims_are_judged(served: Services, tmp_path: Path) -> None:
    lines = [json.loads(line) | {"split": number % 3} for number, line in enumerate(dataset_jsonl(9).splitlines())]
    (tmp_path / "split.jsonl").write_text("\n".join(map(json.dumps, lines)))
    served.datasets.create(tmp_path / "split.jsonl", "split.jsonl", None, "split", {})
    for asked, wanted in (({"split": "test"}, 3), ({"split": "test", "max_claims": 2}, 2), ({"max_claims": 50}, 9)):
        job = submit(served, dataset="split", controls=[], **asked)
        assert isinstance(job.plan, EvaluationPlan)
        assert job.plan.claims == wanted
        assert run(served)
        assert report_of(served, job).claims == wanted


def test_a_fitted_calibration_is_applied_to_the_adapter_from_then_on(served: Services, tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_bytes(dataset_jsonl(40))
    served.datasets.create(tmp_path / "many.jsonl", "many.jsonl", None, "many", {})
    served.jobs.submit({"dataset": "many"})
    adapter = make_adapter(served, lease(served), tmp_path / "adapter", "judge")
    asked = PredictRequest(claim="The Rhine flows into the North Sea.", adapter=adapter, corpus="pages")
    raw = served.predictions.predict(asked)
    assert raw.probability_method == "verdict_branch"
    assert raw.confidence == pytest.approx(0.9)

    job = submit(served, dataset="many", adapters=["judge"], fit_calibration=True, controls=[])
    assert run(served)
    base, fitted = report_of(served, job).runs
    assert (base.run.adapter, base.calibrated) == (None, None)
    assert fitted.calibrated is not None
    assert fitted.calibrated.ece < fitted.calibration.ece
    calibration = served.adapters.get("judge").calibration
    assert calibration is not None
    assert calibration.claims == 40
    after = served.predictions.predict(asked)
    assert after.probability_method == "verdict_branch_calibrated"
    assert after.verdict is raw.verdict
    assert after.probabilities == pytest.approx(calibration.apply(raw.probabilities))

    again = submit(served, dataset="many", adapters=["judge"], controls=[], include_base=False)
    assert run(served)
    (applied,) = report_of(served, again).runs
    assert applied.calibration.ece < fitted.calibration.ece


def test_a_calibration_needs_claims(served: Services, tmp_path: Path) -> None:
    served.jobs.submit({"dataset": "rows"})
    make_adapter(served, lease(served), tmp_path / "adapter", "judge")
    with pytest.raises(InvalidError, match="at least 30 claims"):
        submit(served, adapters=["judge"], fit_calibration=True)


def test_keys_without_effect_and_too_many_claims_are_refused(served: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, words in (
        ({"fit_calibration": True}, "name one in adapters"),
        ({"include_base": False}, "only the base is judged"),
        ({"include_base": False, "base_model": "tiny"}, "only the base is judged"),
    ):
        with pytest.raises(InvalidError, match=words):
            submit(served, **spec)
    monkeypatch.setattr(evaluations, "MAX_ANSWERS", 3 * CLAIMS - 1)
    with pytest.raises(InvalidError, match="set max_claims"):
        submit(served)
    submit(served, max_claims=CLAIMS - 1)


def test_a_claim_that_fails_while_inference_is_ready_ends_the_job_in_words(
    served: Services, generator: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_attempt, "RETRY_PAUSE_SECONDS", 0.01)
    generator.fault = UnavailableError("logits that are not finite", code="inference_away")
    job = submit(served)
    assert run(served)
    assert served.jobs.get(job.id).status is JobStatus.FAILED
    events = served.jobs.events(job.id, 0, 100)[0]
    assert ("waiting", "claims wait for inference: logits that are not finite") in [
        (event.kind, event.message) for event in events
    ]
    assert "logits that are not finite" in events[-1].message


def test_a_claim_that_inference_refuses_is_named(served: Services, generator: Counting) -> None:
    generator.fault = InvalidError("the prompt has 3,000 tokens", code="inference_refused")
    job = submit(served)
    assert run(served)
    job = served.jobs.get(job.id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert re.fullmatch(r"claim \d+, judged by tiny(, claim only)?: the prompt has 3,000 tokens", job.error.message)


def test_an_adapter_that_was_deleted_half_way_is_named(served: Services, tmp_path: Path) -> None:
    served.jobs.submit({"dataset": "rows"})
    adapter = make_adapter(served, lease(served), tmp_path / "adapter", "judge")
    job = submit(served, adapters=["judge"])
    served.adapters.delete(adapter)
    assert run(served)
    error = served.jobs.get(job.id).error
    assert error is not None
    assert error.code == "unknown_adapter"


def test_a_deleted_evaluation_leaves_no_answer(served: Services) -> None:
    job = submit(served, controls=[])
    assert run(served)
    served.jobs.delete(job.id)
    with served.database.read() as unit:
        assert unit.evaluation_answers.list_answers(job.id) == []


def test_a_model_that_writes_alone_invents_its_observations(
    served: Services, generator: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(prompt: str, request: GenerationRequest) -> str:
        if request.stop or request.allowed_token_ids is not None:
            return judges_by_reading(prompt, request)
        return (
            " I know.\nAction 1: Browse[Rhine]\nObservation 1: It is so.\nThought 2: Yes.\nAction 2: Finish[SUPPORTS]"
        )

    monkeypatch.setattr(generator, "_script", judge)
    job = submit(served, controls=["ungrounded"])
    assert run(served)
    plain, alone = report_of(served, job).runs
    assert (plain.valid_actions, plain.invented_observations) == (1.0, 0)
    assert (alone.run.control, alone.valid_actions, alone.invented_observations) == ("ungrounded", 0.5, CLAIMS)
    assert alone.confusion[SUPPORTS][SUPPORTS] == CLAIMS / 2


# The gate.


@pytest.fixture
def trained_rows(served: Services, tmp_path: Path) -> None:
    """A dataset to train on: not the claims that are judged."""
    (tmp_path / "trained.jsonl").write_bytes(dataset_jsonl(5))
    served.datasets.create(tmp_path / "trained.jsonl", "trained.jsonl", None, "trained", {})


def train_and_publish(served: Services, directory: Path, name: str, **after: object) -> str:
    """Publish an adapter at the end of a job with `evaluate_after`, as the supervisor does. Returns its id."""
    options = {"dataset": "rows", "corpus": "pages", "controls": []} | after
    job = served.jobs.submit({"dataset": "trained", "name": name, "trainer": {"evaluate_after": options}})
    assert isinstance(job.spec, TrainSpec)
    resolved = job.spec.trainer.evaluate_after
    assert resolved is not None
    assert resolved.dataset == served.datasets.get(str(options["dataset"])).id
    lent = lease(served)
    build = partial(served.evaluations.build_evaluation_job, resolved)
    manifest = manifest_of(served, lent)
    files = write_adapter(directory, name, manifest.kind)
    published = served.adapters.publish(lent, name, files, manifest, build, gated=resolved.promote)
    assert published is not None
    return published


def last_event(served: Services, kind: str) -> Event:
    """The newest event of this kind, of all jobs."""
    jobs, _ = served.jobs.list_jobs(None, 50, None)
    return next(event for job in jobs for event in served.jobs.events(job.id, 0, 100)[0] if event.kind == kind)


class Knowing:
    """A model that gives the label where it is an adapter that knows, and never elsewhere."""

    def __init__(self, served: Services) -> None:
        self.served = served
        self.digests = set[str]()
        self.labels = {row.claim: row.verdict for row in served.datasets.stream("rows")}

    def learn(self, adapter: str) -> None:
        self.digests.add(self.served.adapters.get(adapter).digest)

    def __call__(self, prompt: str, request: GenerationRequest) -> str:
        answer = judges_by_reading(prompt, request)
        if answer not in set(Verdict):
            return answer
        label = self.labels[re.findall(r"Claim: (.*)", prompt)[-1]]
        return label if request.model in self.digests else next(one for one in Verdict if one is not label)


@pytest.fixture
def knowing(served: Services, trained_rows: None, generator: Counting, monkeypatch: pytest.MonkeyPatch) -> Knowing:
    script = Knowing(served)
    monkeypatch.setattr(generator, "_script", script)
    return script


def test_an_adapter_that_beats_its_base_is_promoted_and_one_that_does_not_beat_that_is_kept(
    served: Services, knowing: Knowing, tmp_path: Path
) -> None:
    first = train_and_publish(served, tmp_path / "first", "first")
    knowing.learn(first)
    assert served.adapters.default() is None
    evaluation = last_event(served, "evaluation").data["job_id"]
    assert run(served)
    report = report_of(served, served.jobs.get(evaluation))
    assert report.gate is not None
    assert (report.gate.outcome, report.gate.comparison.first) == ("promoted", "tiny")
    assert report.gate.comparison.p_value < 0.05
    promoted = served.adapters.default()
    assert promoted is not None
    assert promoted.id == first
    assert "first is the default adapter" in last_event(served, "promoted").message

    second = train_and_publish(served, tmp_path / "second", "second")
    knowing.learn(second)
    evaluation = last_event(served, "evaluation").data["job_id"]
    assert run(served)
    report = report_of(served, served.jobs.get(evaluation))
    assert report.gate is not None
    assert (report.gate.outcome, report.gate.comparison.first) == ("inconclusive", first)
    assert [one.run.adapter for one in report.runs] == [None, first, second]
    assert served.adapters.default() == promoted
    assert "second is kept, not promoted" in last_event(served, "inconclusive").message


def test_a_gate_does_not_undo_a_promotion_that_came_between(served: Services, knowing: Knowing, tmp_path: Path) -> None:
    first = train_and_publish(served, tmp_path / "first", "first")
    knowing.learn(first)
    other = train_and_publish(served, tmp_path / "other", "other", promote=False)
    served.adapters.promote(other)
    assert run(served)
    assert served.adapters.default() == served.adapters.get(other)
    assert "another adapter was promoted meanwhile" in last_event(served, "warning").message


def test_the_adapter_to_beat_keeps_its_own_calibration(served: Services, knowing: Knowing, tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_bytes(dataset_jsonl(40))
    served.datasets.create(tmp_path / "many.jsonl", "many.jsonl", None, "many", {})
    knowing.labels = {row.claim: row.verdict for row in served.datasets.stream("many")}
    first = train_and_publish(served, tmp_path / "first", "first", promote=False)
    train_and_publish(served, tmp_path / "second", "second", dataset="many", fit_calibration=True)
    while run(served):
        pass
    assert served.adapters.get(first).calibration is None
    assert served.adapters.get("second").calibration is not None


def test_without_a_gate_the_first_adapter_is_promoted_and_evaluated(
    served: Services, trained_rows: None, tmp_path: Path
) -> None:
    only = train_and_publish(served, tmp_path / "only", "only", promote=False)
    assert run(served)
    assert report_of(served, served.jobs.get(last_event(served, "evaluation").data["job_id"])).gate is None
    assert served.adapters.default() == served.adapters.get(only)


def test_an_adapter_is_published_also_if_its_evaluation_cannot_be_queued(
    served: Services, trained_rows: None, tmp_path: Path
) -> None:
    (tmp_path / "other.jsonl").write_bytes(dataset_jsonl(3))
    served.datasets.create(tmp_path / "other.jsonl", "other.jsonl", None, "other", {})
    options = {"dataset": "other", "corpus": "pages"}
    job = served.jobs.submit({"dataset": "trained", "trainer": {"evaluate_after": options}})
    assert isinstance(job.spec, TrainSpec)
    resolved = job.spec.trainer.evaluate_after
    assert resolved is not None
    lent = lease(served)

    def build(adapter: Adapter) -> Any:
        """Built in time, and the dataset is deleted before the row is added."""
        row = served.evaluations.build_evaluation_job(resolved, adapter)
        served.datasets.delete("other")
        return row

    manifest = manifest_of(served, lent)
    files = write_adapter(tmp_path / "adapter", "made", manifest.kind)
    assert served.adapters.publish(lent, "made", files, manifest, build, gated=True)
    assert served.jobs.get(job.id).status is JobStatus.SUCCEEDED
    assert "the adapter is not evaluated: its dataset was deleted" in last_event(served, "warning").message

    job = served.jobs.submit({"dataset": "trained"})
    lent = lease(served)
    gone = partial(served.evaluations.build_evaluation_job, resolved)
    files = write_adapter(tmp_path / "late", "late", manifest.kind)
    assert served.adapters.publish(lent, "late", files, manifest_of(served, lent), gone, gated=True)
    assert "the adapter is not evaluated: there is no dataset" in last_event(served, "warning").message


def test_an_evaluation_after_training_is_checked_when_the_job_is_submitted(
    served: Services, trained_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluations, "MAX_ANSWERS", 4 * CLAIMS - 1)
    for options, words in (
        ({"dataset": "trained"}, "the rows that are trained"),
        ({"dataset": "rows"}, "set max_claims"),
        ({"dataset": "none"}, "there is no dataset"),
        ({"dataset": "rows", "corpus": "none"}, "there is no corpus"),
        ({"dataset": "rows", "split": "test"}, "no claim in the split"),
        ({"dataset": "rows", "fit_calibration": True}, "at least 30 claims"),
    ):
        for ask in (served.jobs.submit, served.jobs.plan):
            with pytest.raises(InvalidError, match=words) as refused:
                ask({"dataset": "trained", "trainer": {"evaluate_after": options}})
            assert refused.value.problems[0].loc == ("trainer", "evaluate_after")


def test_a_promotion_needs_one_adapter_and_its_base(served: Services) -> None:
    with pytest.raises(InvalidError, match="exactly one"):
        submit(served, promote=True)
    for key, value in (("include_base", False), ("base_model", "tiny")):
        with pytest.raises(InvalidError, match=f"leave {key} out"):
            submit(served, promote=True, adapters=["none"], **{key: value})
