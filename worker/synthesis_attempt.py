"""An attempt at a synthesis: make the rows, store them as a dataset, write the report. It needs no tensors.

A stopped attempt keeps nothing; the next one begins again, and makes the same rows.
"""

import time
from pathlib import Path

from app.domain.errors import InvalidError
from app.domain.synthesis import RegroundSpec, SynthesisSpec
from app.services.syntheses import PreparedSynthesis, Tally, build_synthesis_report
from worker.attempt import Attempt

FLUSH_SECONDS = 1.0


class SynthesisAttempt(Attempt):
    def _run(self) -> None:
        spec = self._leased.spec
        assert isinstance(spec, SynthesisSpec | RegroundSpec)
        prepared = self._retry(lambda: self._services.syntheses.prepare(spec))
        tally = Tally()
        if not self._make_rows(prepared, tally):
            self._release("stopped; the rows will be made again", strike=False)
            return
        self._conclude(prepared, tally)

    def _make_rows(self, prepared: PreparedSynthesis, tally: Tally) -> bool:
        """Write the rows to a file of this attempt. False if the job, or this worker, has to stop before the end."""
        self._directory.mkdir(parents=True, exist_ok=True)
        flushed_at = time.monotonic()
        with self._rows.open("wb") as out:
            for line in self._services.syntheses.make_rows(prepared, tally):
                out.write(line or b"")
                if time.monotonic() - flushed_at < FLUSH_SECONDS:
                    continue
                self._retry(lambda: self._services.syntheses.record(self._lease, prepared, tally))
                flushed_at = time.monotonic()
                if self._must_stop():
                    return False
        return not self._must_stop()

    @property
    def _rows(self) -> Path:
        return self._directory / "rows.jsonl"

    def _conclude(self, prepared: PreparedSynthesis, tally: Tally) -> None:
        """Store the report first: it says why rows were left out, also if none was made."""
        dataset = None
        if tally.made:
            stored = self._retry(lambda: self._services.syntheses.store(self._leased.name, prepared, self._rows))
            dataset = stored.id
        report = build_synthesis_report(self._leased.job_id, self._leased.name, prepared, tally, dataset)
        path = self._directory / "report.json"
        path.write_text(report.model_dump_json(indent=1), encoding="utf-8")
        self._retry(lambda: self._services.artifacts.put(self._lease, path))
        self._retry(lambda: self._services.syntheses.record(self._lease, prepared, tally, dataset))
        if dataset is None:
            reasons = ", ".join(f"{code}: {count:,}" for code, count in report.refused.items())
            raise InvalidError(
                f"no trajectory could be made of the {tally.read:,} rows ({reasons}); report.json names each row",
                code="no_rows_made",
            )
        message = f"{tally.made:,} of {tally.read:,} rows made; the dataset is {stored.name}"
        self._end(lambda: self._attempts.succeed(self._lease, message, {"dataset": dataset, "rows": tally.made}))
