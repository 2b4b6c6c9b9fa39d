"""An attempt at a synthesis: make the rows, store them as a dataset, write the report. It needs no tensors.

A stopped attempt keeps nothing; the next one begins again, and makes the same rows.
"""

import time
from pathlib import Path

from app.domain.errors import InvalidError
from app.domain.synthesis import RegroundSpec, SynthesisSpec
from app.services.datasets import Dataset
from app.services.syntheses import PreparedSynthesis, Tally, build_synthesis_report
from worker.attempt import Attempt

FLUSH_SECONDS = 1.0


class SynthesisAttempt(Attempt):
    def _run(self) -> None:
        spec = self._leased.spec
        assert isinstance(spec, SynthesisSpec | RegroundSpec)
        prepared = self._retry(lambda: self._services.syntheses.prepare(spec))
        tally = Tally()
        if not self._make_rows(prepared, tally) or not self._store(prepared, tally):
            self._release("stopped; the rows will be made again", strike=False)

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

    def _store(self, prepared: PreparedSynthesis, tally: Tally) -> bool:
        """Store the dataset and end the job. False if the job, or this worker, had to stop meanwhile.

        The report is stored before, too: it says why rows were left out, also if the dataset cannot be stored.
        """
        self._put_report(prepared, tally, None)
        if not tally.made:
            reasons = ", ".join(f"{code}: {count:,}" for code, count in tally.refused.most_common())
            raise InvalidError(
                f"no trajectory could be made of the {tally.read:,} rows ({reasons}); report.json names each row",
                code="no_rows_made",
            )
        syntheses = self._services.syntheses
        dataset, new = self._retry(lambda: syntheses.store(self._leased.name, prepared, self._rows))
        if self._must_stop():
            if new:
                self._retry(lambda: syntheses.discard(dataset))
            return False
        self._put_report(prepared, tally, dataset)
        self._retry(lambda: syntheses.record(self._lease, prepared, tally, dataset))
        message = f"{dataset.rows:,} of {tally.read:,} rows made; the dataset is {dataset.name}"
        self._end(lambda: self._attempts.succeed(self._lease, message, {"dataset": dataset.id, "rows": dataset.rows}))
        return True

    def _put_report(self, prepared: PreparedSynthesis, tally: Tally, dataset: Dataset | None) -> None:
        report = build_synthesis_report(self._leased.job_id, self._leased.name, prepared, tally, dataset)
        path = self._directory / "report.json"
        path.write_text(report.model_dump_json(indent=1), encoding="utf-8")
        self._retry(lambda: self._services.artifacts.put(self._lease, path))
