"""Syntheses, run by a runner: a new dataset, a report, and nothing of an attempt that was stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.composition import Services
from app.domain.claims import Verdict
from app.domain.errors import ConflictError, InvalidError, NotFoundError
from app.domain.identity import new_id
from app.domain.jobs import Job, JobAction, JobStatus
from app.domain.synthesis import RegroundSpec, SynthesisProgress, SynthesisReport, SynthesisSpec
from app.services.syntheses import AnySynthesis
from tests.conftest import corpus_jsonl, dataset_jsonl
from worker import synthesis_attempt
from worker.supervisor import Supervisor

CLAIMS: list[dict[str, Any]] = [
    {"claim": "The Rhine flows into the North Sea.", "label": "SUPPORTS", "page": "Rhine", "evidence": [["Rhine", 1]]},
    {"claim": "The Rhine flows into the Black Sea.", "label": "REFUTES", "page": "Rhine", "evidence": [["Rhine", 1]]},
    {"claim": "The Volga is older than the Rhine.", "label": "NOT ENOUGH INFO", "page": "Volga"},
    {"claim": "The Volga is a broad river.", "label": "SUPPORTS", "page": "Volga"},
    {"claim": "The Oder is a river.", "label": "SUPPORTS", "page": "Oder"},
    {"claim": "A river is wet.", "label": "SUPPORTS"},
]


@pytest.fixture(autouse=True)
def stored(services: Services, tmp_path: Path) -> None:
    (tmp_path / "claims.jsonl").write_text("\n".join(map(json.dumps, CLAIMS)))
    (tmp_path / "rows.jsonl").write_bytes(dataset_jsonl(6))
    (tmp_path / "pages.jsonl").write_bytes(corpus_jsonl())
    services.datasets.create(tmp_path / "claims.jsonl", "claims.jsonl", None, "claims", {}, "claims")
    services.datasets.create(tmp_path / "rows.jsonl", "rows.jsonl", None, "rows", {})
    services.corpora.create(tmp_path / "pages.jsonl", "pages.jsonl", "pages")


def submit(services: Services, spec: AnySynthesis) -> Job:
    return services.jobs.get(services.syntheses.submit(spec))


def run(services: Services) -> bool:
    return Supervisor(services, "runner-1", ("cpu",)).work()


def report_of(services: Services, job: Job) -> SynthesisReport:
    return SynthesisReport.model_validate_json(b"".join(services.artifacts.stream(job.id, "report.json")))


def progress_of(job: Job) -> SynthesisProgress:
    assert isinstance(job.progress, SynthesisProgress)
    return job.progress


def test_claims_become_trajectories(services: Services) -> None:
    job = submit(services, SynthesisSpec(dataset="claims", corpus="pages", output="made", name="first"))
    assert (job.kind, job.status, progress_of(job)) == ("synthesize", "queued", SynthesisProgress(rows_total=6))
    assert run(services)
    job = services.jobs.get("first")
    assert (job.status, job.error) == (JobStatus.SUCCEEDED, None)
    made = services.datasets.get("made")
    assert progress_of(job) == SynthesisProgress(rows_read=6, rows_total=6, rows_made=4, dataset=made.id)
    rows = list(services.datasets.stream("made"))
    assert [row.claim for row in rows] == [str(claim["claim"]) for claim in CLAIMS[:4]]
    assert [row.verdict.value for row in rows] == [claim["label"] for claim in CLAIMS[:4]]
    assert len({row.split for row in rows if row.page == "Rhine"}) == 1
    report = report_of(services, job)
    assert report.refused == {"page_missing": 1, "page_not_named": 1}
    assert [(one.row, one.code) for one in report.refusals] == [(5, "page_missing"), (6, "page_not_named")]
    assert (report.labels[Verdict.SUPPORTS], report.rows_made, report.dataset) == (2, 4, made.id)
    assert report.actions.searches_found >= 4
    assert not list(services.settings.work_path.glob("job_*"))


def test_contrasts_are_decided_the_other_way_by_the_same_page(services: Services) -> None:
    """Seed 0 negates a claim about the Volga. What is made of the claims themselves stays the same."""
    for name, share in (("plain", 0.0), ("changed", 1.0)):
        submit(
            services, SynthesisSpec(dataset="claims", corpus="pages", output=name, name=name, contrasts=share, seed=0)
        )
        assert run(services)
    plain, changed = (list(services.datasets.stream(name)) for name in ("plain", "changed"))
    own = {row.claim for row in plain}
    assert [row for row in changed if row.claim in own] == plain
    contrasts = [row for row in changed if row.claim not in own]
    assert contrasts
    for row in contrasts:
        before = changed[changed.index(row) - 1]
        assert (row.page, row.split) == (before.page, before.split)
        assert {row.verdict, before.verdict} == {Verdict.SUPPORTS, Verdict.REFUTES}
        assert [str(step.action) for step in row.steps[:1]] == [str(step.action) for step in before.steps[:1]]
    reports = [report_of(services, services.jobs.get(name)) for name in ("plain", "changed")]
    assert [report.contrasts for report in reports] == [0, len(contrasts)]
    assert reports[1].rows_made == len(changed)


def test_the_same_synthesis_makes_the_same_dataset(services: Services) -> None:
    jobs = [submit(services, SynthesisSpec(dataset="claims", corpus="pages")) for _ in range(2)]
    while run(services):
        pass
    first, second = (progress_of(services.jobs.get(job.id)).dataset for job in jobs)
    assert first == second is not None


def test_repeated_trajectories_are_counted_as_left_out(services: Services, tmp_path: Path) -> None:
    twice = [CLAIMS[3], CLAIMS[3] | {"evidence": [["Volga", 0]]}]
    (tmp_path / "twice.jsonl").write_text("\n".join(map(json.dumps, twice)))
    services.datasets.create(tmp_path / "twice.jsonl", "twice.jsonl", None, "twice", {}, "claims")
    job = submit(services, SynthesisSpec(dataset="twice", corpus="pages", output="made"))
    assert run(services)
    report = report_of(services, services.jobs.get(job.id))
    assert (report.rows_read, report.rows_made, report.refused) == (2, 1, {"duplicate": 1})
    assert services.datasets.get("made").rows == 1


def test_a_split_of_the_claims_is_kept(services: Services, tmp_path: Path) -> None:
    lines = [claim | {"split": number % 3} for number, claim in enumerate(CLAIMS[:3])]
    (tmp_path / "split.jsonl").write_text("\n".join(map(json.dumps, lines)))
    services.datasets.create(tmp_path / "split.jsonl", "split.jsonl", None, "split", {}, "claims")
    submit(services, SynthesisSpec(dataset="split", corpus="pages", output="made"))
    assert run(services)
    assert [row.split for row in services.datasets.stream("made")] == ["train", "validation", "test"]


def test_a_dataset_is_regrounded(services: Services) -> None:
    job = submit(services, RegroundSpec(dataset="rows", corpus="pages", output="new"))
    assert run(services)
    job = services.jobs.get(job.id)
    assert (job.status, job.error, job.kind) == (JobStatus.SUCCEEDED, None, "reground")
    (first, *_rest) = services.datasets.stream("new")
    assert first.steps[0].observation == "The Rhine carries trade. The river flows into the North Sea."
    report = report_of(services, job)
    assert (report.actions.searches, report.actions.searches_found, report.rows_made) == (6, 6, 6)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (SynthesisSpec(dataset="none"), NotFoundError),
        (SynthesisSpec(dataset="claims", corpus="none"), NotFoundError),
        (SynthesisSpec(dataset="claims", output="rows"), ConflictError),
        (SynthesisSpec(dataset="claims", output=new_id("ds")), InvalidError),
        (RegroundSpec(dataset="claims", corpus="pages"), InvalidError),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(
    services: Services, spec: AnySynthesis, wanted: type[Exception]
) -> None:
    with pytest.raises(wanted):
        submit(services, spec)


def test_if_no_row_can_be_made_the_job_fails_and_says_why(services: Services, tmp_path: Path) -> None:
    (tmp_path / "lost.jsonl").write_text(json.dumps(CLAIMS[4]))
    services.datasets.create(tmp_path / "lost.jsonl", "lost.jsonl", None, "lost", {}, "claims")
    job = submit(services, SynthesisSpec(dataset="lost", corpus="pages"))
    assert run(services)
    job = services.jobs.get(job.id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert (job.error.code, "page_missing: 1" in job.error.message) == ("no_rows_made", True)
    assert report_of(services, job).refusals[0].row == 1


@pytest.mark.parametrize(("action", "ends"), [(JobAction.PAUSE, JobStatus.PAUSED), (JobAction.CANCEL, "cancelled")])
def test_a_running_synthesis_is_stopped_and_keeps_nothing(
    services: Services, monkeypatch: pytest.MonkeyPatch, action: JobAction, ends: str
) -> None:
    monkeypatch.setattr(synthesis_attempt, "FLUSH_SECONDS", 0.0)
    job = submit(services, SynthesisSpec(dataset="claims", corpus="pages", output="made"))
    interrupt(services, monkeypatch, lambda: services.jobs.request_action(job.id, action))
    assert run(services)
    assert services.jobs.get(job.id).status == ends
    assert not services.datasets.exists("made")
    if action is JobAction.PAUSE:
        services.jobs.request_action(job.id, JobAction.RESUME)
        assert run(services)
        assert services.datasets.get("made").rows == 4


def interrupt(services: Services, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call `act` behind the second row of the next attempt, and renew its lease, which shows the wish."""
    begin = synthesis_attempt.SynthesisAttempt._must_stop
    calls: list[int] = []

    def watch(attempt: synthesis_attempt.SynthesisAttempt) -> bool:
        calls.append(1)
        if len(calls) == 2:
            act()
            attempt._heartbeat.status = services.attempts.renew(attempt._lease)
        return begin(attempt)

    monkeypatch.setattr(synthesis_attempt.SynthesisAttempt, "_must_stop", watch)


def test_a_killed_attempt_is_made_again(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submit(services, SynthesisSpec(dataset="claims", corpus="pages", output="made"))
    supervisor = Supervisor(services, "runner-1", ("cpu",))
    store = type(services.syntheses).store

    def die(*given: object) -> object:
        store(*given)  # type: ignore[arg-type]
        supervisor.leave()
        raise KeyboardInterrupt

    monkeypatch.setattr(type(services.syntheses), "store", die)
    with pytest.raises(KeyboardInterrupt):
        supervisor.work()
    monkeypatch.undo()
    made = services.datasets.get("made")
    with services.database.write() as unit:
        row = unit.jobs.find(job.id)
        assert row is not None
        row.lease_until = 0.0
    assert run(services)
    assert progress_of(services.jobs.get(job.id)).dataset == made.id
