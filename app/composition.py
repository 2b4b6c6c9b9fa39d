"""Settings → services: the one wiring, used by the API, the CLI, the workers and inference."""

from dataclasses import dataclass
from functools import cached_property

from app.db import Database
from app.generation import CompletionsGenerator, Generator
from app.queue import CeleryDoorbell, Doorbell
from app.queue.celery import celery_app
from app.services.adapters import Adapters
from app.services.artifacts import Artifacts
from app.services.attempts import Attempts
from app.services.base_models import BaseModels
from app.services.checkpoints import Checkpoints
from app.services.corpora import Corpora
from app.services.datasets import Datasets
from app.services.devices import Devices
from app.services.encodings import Encodings
from app.services.evaluation_runner import EvaluationRunner
from app.services.evaluations import Evaluations
from app.services.events import EventFeed
from app.services.idempotency import Idempotency
from app.services.job_snapshot import JobSnapshots
from app.services.jobs import Jobs
from app.services.ledger import Ledger
from app.services.plans import Plans
from app.services.predictions import Predictions
from app.services.stored_predictions import StoredPredictions
from app.services.syntheses import Syntheses
from app.settings import Settings
from app.storage import Blobs, open_blobs


@dataclass(frozen=True)
class Services:
    """Every service of one deployment. Each is created at its first use.

    `given_doorbell` and `given_generator` replace the default ones: embedders and tests pass those in memory.
    """

    settings: Settings
    given_doorbell: Doorbell | None = None
    given_generator: Generator | None = None

    @cached_property
    def database(self) -> Database:
        return Database(self.settings.database)

    @cached_property
    def blobs(self) -> Blobs:
        return open_blobs(self.settings.storage)

    @cached_property
    def doorbell(self) -> Doorbell:
        return self.given_doorbell or CeleryDoorbell(celery_app(self.settings.broker))

    @cached_property
    def generator(self) -> Generator:
        return self.given_generator or CompletionsGenerator(self.settings.inference, self.settings.inference_secret)

    @cached_property
    def datasets(self) -> Datasets:
        return Datasets(self.database, self.blobs, self.settings.work_path / "uploads")

    @cached_property
    def corpora(self) -> Corpora:
        return Corpora(self.database, self.blobs, self.settings.cache_path)

    @cached_property
    def base_models(self) -> BaseModels:
        return BaseModels(self.database, self.blobs, self.settings.default_base_model)

    @cached_property
    def devices(self) -> Devices:
        return Devices(self.database, self.ledger)

    @cached_property
    def ledger(self) -> Ledger:
        settings = self.settings
        return Ledger(self.database, settings.device_policy, settings.inference_memory, settings.lease_seconds)

    @cached_property
    def plans(self) -> Plans:
        encodings = Encodings(self.database, self.blobs)
        cap = self.settings.max_sequence_length
        return Plans(self.database, self.base_models, encodings, self.devices, self.adapters, self.ledger, cap)

    @cached_property
    def jobs(self) -> Jobs:
        return Jobs(self.database, self.blobs, self.plans, self.evaluations, self.doorbell)

    @cached_property
    def job_snapshots(self) -> JobSnapshots:
        return JobSnapshots(self.jobs)

    @cached_property
    def attempts(self) -> Attempts:
        return Attempts(self.database, self.blobs, self.plans, self.settings.lease_seconds)

    @cached_property
    def events(self) -> EventFeed:
        return EventFeed(self.database, self.jobs)

    @cached_property
    def adapters(self) -> Adapters:
        return Adapters(self.database, self.blobs, self.settings.cache_path)

    @cached_property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.database, self.blobs)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.database, self.blobs, self.adapters)

    @cached_property
    def stored_predictions(self) -> StoredPredictions:
        return StoredPredictions(self.database)

    @cached_property
    def predictions(self) -> Predictions:
        return Predictions(
            self.stored_predictions,
            self.adapters,
            self.base_models,
            self.corpora,
            self.generator,
            self.settings.prediction_slots,
            self.settings.max_sequence_length,
        )

    @cached_property
    def evaluations(self) -> Evaluations:
        return Evaluations(
            self.database,
            self.datasets,
            self.corpora,
            self.adapters,
            self.base_models,
            self.doorbell,
        )

    @cached_property
    def evaluation_runner(self) -> EvaluationRunner:
        return EvaluationRunner(self.database, self.evaluations, self.corpora, self.adapters, self.predictions)

    @cached_property
    def syntheses(self) -> Syntheses:
        return Syntheses(self.database, self.datasets, self.corpora, self.doorbell)

    @cached_property
    def idempotency(self) -> Idempotency:
        return Idempotency(self.database)

    def sweep(self) -> None:
        """Delete the partial files of killed processes on this host."""
        self.datasets.sweep()
        self.corpora.sweep()
        self.adapters.sweep()

    def close(self) -> None:
        """Close the connections of the services that were created."""
        for part in ("generator", "database"):
            if part in self.__dict__:
                self.__dict__[part].close()


def compose(settings: Settings, *, doorbell: Doorbell | None = None, generator: Generator | None = None) -> Services:
    return Services(settings, doorbell, generator)
