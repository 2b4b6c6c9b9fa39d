"""Evaluation jobs, run by a runner over a scripted model: judged once, resumed, paused, cancelled, reported."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.composition import Services, compose
from app.domain.claims import Verdict
from app.domain.errors import ConflictError, InvalidError, NotFoundError, UnavailableError, VerituneError
from app.domain.evaluations import EvaluationPlan, EvaluationProgress, EvaluationReport, EvaluationSpec
from app.domain.jobs import Job, JobAction, JobStatus
from app.domain.predictions import PredictRequest
from app.generation.base import GenerationRequest
from app.generation.scripted import ScriptedGenerator
from app.services import evaluations
from tests.api.conftest import lease, make_adapter
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
    assert re.fullmatch(r"claim \d+, judged by tiny: the prompt has 3,000 tokens", job.error.message)


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
