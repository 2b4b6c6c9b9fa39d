"""An attempt at an evaluation job: judge the remaining claims, several at a time, and write the report.

It needs no tensors: inference computes. Every answer is stored, so that a later attempt judges only what is left.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from pathlib import Path

import structlog

from app.composition import Services
from app.domain.errors import (
    BusyError,
    ClientDisconnectedError,
    InvalidError,
    StorageError,
    UnavailableError,
    VerituneError,
)
from app.domain.evaluations import EvaluationProgress, EvaluationRun, EvaluationSpec
from app.domain.predictions import Prediction
from app.services.attempts import Leased
from app.services.evaluation_runner import PreparedEvaluation, build_report
from worker.attempt import Attempt
from worker.evaluation_page import render_page
from worker.heartbeat import Heartbeat

THREADS = 16
"""Claims that are judged at a time: the engine's batch."""

FLUSH_SECONDS = 1.0
RETRY_PAUSE_SECONDS = 2.0
"""Pause before a claim is judged again after inference did not answer or was busy."""

MAX_FAILURES = 5
"""The job fails after a claim has failed so often while inference was ready."""

log = structlog.get_logger(__name__)

Judged = tuple[EvaluationRun, int, Prediction]


class EvaluationAttempt(Attempt):
    def __init__(
        self, services: Services, leased: Leased, directory: Path, heartbeat: Heartbeat, leaving: threading.Event
    ) -> None:
        super().__init__(services, leased, directory, heartbeat, leaving)
        self._waiting = threading.Lock()
        self._has_waited = False

    def _run(self) -> None:
        spec = self._leased.spec
        assert isinstance(spec, EvaluationSpec)
        prepared = self._retry(lambda: self._services.evaluation_runner.prepare(self._leased.job_id, spec))
        if not self._judge_all(prepared):
            self._release("stopped behind the last judged claim", strike=False)
            return
        self._conclude(prepared)

    def _judge_all(self, prepared: PreparedEvaluation) -> bool:
        """Judge what is left. False if the job, or this worker, has to stop before the end."""
        stopped = threading.Event()
        waiting, running = prepared.remaining(), set[Future[Judged]]()
        progress = _Progress(prepared)
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                while not self._must_stop():
                    for run, index in islice(waiting, THREADS - len(running)):
                        running.add(pool.submit(self._judge, prepared, run, index, stopped))
                    if not running:
                        self._flush(progress)
                        return True
                    done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                    for future in done:
                        progress.add(future.result())
                    if time.monotonic() - progress.flushed_at >= FLUSH_SECONDS:
                        self._flush(progress)
                self._flush(progress)
                return False
            except VerituneError:
                self._flush(progress)
                raise
            finally:
                stopped.set()  # the claims that are still being judged end at their next model call

    def _judge(self, prepared: PreparedEvaluation, run: EvaluationRun, index: int, stopped: threading.Event) -> Judged:
        """Judge one claim. While inference does not answer or is busy, wait: a training job may have its device."""
        failures = 0
        while True:
            try:
                return run, index, self._services.evaluation_runner.judge(prepared, run, index, stopped.is_set)
            except (ClientDisconnectedError, StorageError):
                raise
            except InvalidError as error:
                message = f"claim {index + 1}, judged by {run.name}: {error.detail}"
                raise InvalidError(message, code=error.code) from error
            except BusyError as error:
                reason = error.detail
            except UnavailableError as error:
                reason, failures = error.detail, failures + self._is_ready()
                if failures >= MAX_FAILURES or error.code == "inference_secret":
                    raise
            self._note_wait(reason)
            if stopped.wait(RETRY_PAUSE_SECONDS):
                raise ClientDisconnectedError("the evaluation stopped")

    def _is_ready(self) -> bool:
        """Whether inference could judge a claim now."""
        try:
            self._services.predictions.check()
        except VerituneError:
            return False
        return True

    def _note_wait(self, reason: str) -> None:
        """Write an event at the first wait of this attempt."""
        log.info("claim_waits", job=self._leased.job_id, reason=reason)
        with self._waiting:
            if not self._has_waited:
                self._has_waited = True
                message = f"claims wait for inference: {reason}"
                self._retry(lambda: self._attempts.add_event(self._lease, "waiting", message, "warning"))

    def _flush(self, progress: "_Progress") -> None:
        for run, answers in progress.take().items():
            record = partial(self._services.evaluation_runner.record, self._lease, run, answers, progress.now())
            self._retry(record)

    def _conclude(self, prepared: PreparedEvaluation) -> None:
        report = build_report(self._leased.job_id, self._leased.name, prepared)
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / "report.json"
        path.write_text(report.model_dump_json(indent=1), encoding="utf-8")
        answers = self._directory / "answers.jsonl"
        with answers.open("w", encoding="utf-8") as out:
            out.writelines(_lines(prepared))
        page = self._directory / "report.html"
        page.write_text(render_page(report, prepared.gold, prepared.in_order()), encoding="utf-8")
        for artifact in (path, page, answers):
            self._retry(lambda p=artifact: self._services.artifacts.put(self._lease, p))  # type: ignore[misc]
        self._retry(lambda: self._services.evaluation_runner.calibrate(self._lease, prepared))
        self._retry(lambda: self._services.evaluation_runner.promote(self._lease, prepared, report))
        accuracies = {one.run.key: round(one.accuracy.value, 4) for one in report.runs}
        message = "; ".join(f"{one.run.name}: accuracy {one.accuracy.value:.3f}" for one in report.runs)
        self._end(lambda: self._attempts.succeed(self._lease, message, accuracies))


class _Progress:
    """What was judged since the last flush, and the pace of this attempt."""

    def __init__(self, prepared: PreparedEvaluation) -> None:
        self._prepared = prepared
        self._total = len(prepared.gold) * len(prepared.plan.runs)
        self._began = self.flushed_at = time.monotonic()
        self._judged = 0
        self._done = sum(len(answers) for answers in prepared.answers.values())
        self._run: str | None = None
        self._pending: dict[str, dict[int, Prediction]] = {}

    def add(self, judged: Judged) -> None:
        run, index, prediction = judged
        self._prepared.answers[run.key][index] = prediction
        self._pending.setdefault(run.key, {})[index] = prediction
        self._run = run.name
        self._judged += 1
        self._done += 1

    def take(self) -> dict[str, dict[int, Prediction]]:
        taken, self._pending = self._pending, {}
        self.flushed_at = time.monotonic()
        return taken

    def now(self) -> EvaluationProgress:
        pace = self._judged / max(1e-9, time.monotonic() - self._began)
        return EvaluationProgress(
            done=self._done,
            total=self._total,
            run=self._run,
            claims_per_second=round(pace, 3),
            eta_seconds=round((self._total - self._done) / pace, 1) if pace else None,
        )


def _lines(prepared: PreparedEvaluation) -> Iterator[str]:
    """One line of JSON for each answer: its run, the claim's label and the whole prediction."""
    for run in prepared.plan.runs:
        for index, gold in enumerate(prepared.gold):
            answer = prepared.answers[run.key][index].model_dump_json()
            yield f'{{"run": {run.model_dump_json()}, "index": {index}, "label": "{gold.label}", "answer": {answer}}}\n'
