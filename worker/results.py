"""What an attempt leaves behind: the manifest of its weights, artifacts, the published adapter, the device's pace."""

from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import structlog

from app.composition import Services
from app.domain.adapters import Environment, Manifest, ManifestBase
from app.domain.attempts import CheckpointWritten, TrainingFinished
from app.domain.errors import LeaseLostError, UnavailableError
from app.domain.jobs import Metric
from app.domain.tuning_methods import servable_by
from app.services.attempts import Leased
from app.services.plans import Prepared
from worker.attempt_error import TRANSIENT
from worker.event_file import NAME, write_event_file

METRICS_AT_ONCE = 1_000

log = structlog.get_logger(__name__)


class Results:
    """Of one attempt. `environment`: known once the child has started."""

    def __init__(self, services: Services, leased: Leased, prepared: Prepared, directory: Path) -> None:
        self._services = services
        self._leased = leased
        self._prepared = prepared
        self._directory = directory
        self.environment: Environment | None = None

    def publish(self, finished: TrainingFinished, adapter: Path) -> None:
        """Publish the adapter and end the job as succeeded."""
        manifest = self.manifest(finished)
        options = self._prepared.spec.trainer.evaluate_after
        build = None if options is None else partial(self._services.evaluations.build_evaluation_job, options)
        gated = options is not None and options.promote
        lease, name = self._leased.lease, self._leased.name
        self._services.adapters.publish(lease, name, adapter, manifest, build, gated=gated)
        self._remember_pace(finished)

    def store_artifacts(self) -> None:
        """Store the child's artifacts, and the metrics of all attempts for TensorBoard.

        Raises if database or store are away. Any other fault costs the artifacts only, not hours of training.
        """
        artifacts = self._directory / "artifacts"
        try:
            artifacts.mkdir(exist_ok=True)
            write_event_file(self._all_metrics(), self._began(), artifacts / NAME)
            for path in sorted(artifacts.iterdir()):
                self._services.artifacts.put(self._leased.lease, path)
        except LeaseLostError:
            raise
        except Exception as error:
            if isinstance(error, UnavailableError) and error.code in TRANSIENT:
                raise
            log.exception("artifacts_lost", job=self._leased.job_id)
            message = f"the job's artifacts could not be stored: {error}"
            self._services.attempts.add_event(self._leased.lease, "artifacts_lost", message, "warning")

    def _began(self) -> float:
        began = self._services.jobs.get(self._leased.job_id).started_at
        return began.timestamp() if began else 0.0

    def _all_metrics(self) -> Iterator[Metric]:
        after, more = 0, True
        while more:
            found, more = self._services.jobs.metrics(self._leased.job_id, after, METRICS_AT_ONCE)
            yield from found
            after = found[-1].update if found else after

    def _remember_pace(self, finished: TrainingFinished) -> None:
        """Tokens per second of this base on this device, for plans of later jobs. A fault costs only an estimate."""
        pace = finished.metrics.get("tokens_per_second")
        if not pace:
            return
        served = self._services.base_models.served_digest(self._prepared.base, self._prepared.spec.quantization)
        try:
            self._services.devices.measured(self._services.settings.worker_name, served, pace)
        except UnavailableError as error:
            log.warning("pace_not_written", job=self._leased.job_id, reason=error.detail)

    def manifest(self, made: TrainingFinished | CheckpointWritten) -> Manifest:
        """The manifest of an adapter with these weights."""
        prepared, spec = self._prepared, self._prepared.spec
        return Manifest(
            job_id=self._leased.job_id,
            kind="full" if spec.adapter is None else "peft",
            base=ManifestBase(
                name=prepared.base.name,
                revision=self._services.base_models.describe(prepared.base).revision,
                digest=prepared.base.digest,
            ),
            quantization=spec.quantization.model_dump() if spec.quantization else None,
            spec=spec.model_dump(mode="json"),
            dataset_digest=prepared.dataset.digest,
            dataset_rows=prepared.summary.trained,
            protected_share=prepared.plan.protected_share,
            format=spec.format().model_dump(),
            max_sequence_length=prepared.limit,
            seed=spec.seed,
            metrics=made.metrics,
            warnings=made.warnings,
            packages=made.packages,
            environment=self.environment,
            code_revision=version("veritune"),
            servable_by=servable_by(spec.adapter),
            created_at=datetime.now(UTC),
        )
