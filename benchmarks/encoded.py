"""The rows that every contender trains on. Veritune's ingest and encoder create them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.composition import Services, compose
from app.db.migrating import migrate
from app.domain.attempts import BaseOnDisk, EncodedRow, TrainOrder
from app.domain.base_models import BaseModelDescription
from app.domain.plans import Schedule
from app.domain.specs import TrainSpec
from app.settings import Settings
from benchmarks.machine import ROOT
from worker.device import describe_device
from worker.training.batches import batches_of_update, rows_of_update

PLACES = ("shared", "../shared")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is trained: the file's first `rows` rows, `effective` of them in each update."""

    updates: int = 8
    rows: int = 64
    effective: int = 16


def spec_of(scale: Scale) -> dict[str, Any]:
    """The job. Without verdict branches, so that every contender trains the same tokens; without a warm-up, whose
    first rate others count differently."""
    return {
        "dataset": "fever",
        "base_model": "smollm2-135m",
        "adapter": {"type": "lora", "r": 8, "alpha": 16, "dropout": 0.0},
        "quantization": {"bits": 4, "quant_type": "nf4", "double_quant": True},
        "trainer": {
            "train_steps": scale.updates,
            "effective_batch_size": scale.effective,
            "learning_rate": 1e-3,
            "learning_rate_scheduler": {"decay": "cosine", "warmup_fraction": 0.0},
            "verdict_branch": 0.0,
        },
    }


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done: `rows` is the file of the rows that are trained on, `every` holds all of the dataset's."""

    base: BaseOnDisk
    spec: TrainSpec
    schedule: Schedule
    rows: Path
    every: list[EncodedRow]
    resident_limit: int

    @property
    def chosen(self) -> list[EncodedRow]:
        return self.every[: self.schedule.rows]

    def order(self, directory: Path) -> TrainOrder:
        """The work order of an attempt in `directory`."""
        return TrainOrder(
            job_id="job_bench",
            epoch=1,
            base=self.base,
            rows=self.rows,
            directory=directory,
            resume_from=None,
            spec=self.spec,
            schedule=self.schedule,
            resident_limit=self.resident_limit,
        )

    def rows_by_update(self) -> list[list[int]]:
        """The rows of each update, in Veritune's order."""
        updates = range(1, self.schedule.updates + 1)
        return [rows_of_update(update, self.schedule, self.spec.seed) for update in updates]

    def shapes(self) -> list[list[dict[str, Any]]]:
        """Each update's micro-batches: the lengths of their rows, and the number of labelled tokens."""
        found = []
        for update in range(1, self.schedule.updates + 1):
            batches = batches_of_update(self.chosen, update, self.schedule, self.spec.seed)
            found.append([{"lengths": [row.length for row in b.rows], "labelled": b.labelled} for b in batches])
        return found


def prepare(csv: Path, cache: Path, directory: Path, scale: Scale) -> Work:
    """Create the work in a private deployment under `directory`."""
    settings = Settings(home=directory / "home", cache=cache)
    migrate(settings.database)
    services = compose(settings)
    try:
        described = base_in(cache)
        services.base_models.register(described)
        services.devices.report("here", describe_device(("gpu",)))
        services.datasets.create(csv, csv.name, "text/csv", "fever", {})
        return _work(services, described, cache, directory, scale)
    finally:
        services.close()


def _work(services: Services, described: BaseModelDescription, cache: Path, directory: Path, scale: Scale) -> Work:
    prepared = services.plans.prepare(spec_of(scale))
    lines = b"".join(services.blobs.stream(prepared.rows)).splitlines(keepends=True)
    rows = directory / "rows.jsonl"
    rows.write_bytes(b"".join(lines[: scale.rows]))
    every = [EncodedRow.model_validate_json(line) for line in lines]
    longest = max(len(row.all_ids) for row in every[: scale.rows])
    base = BaseOnDisk(
        path=cache / "models" / described.digest,
        digest=described.digest,
        name=described.name,
        revision=described.revision,
        fp16=described.fp16,
    )
    schedule = Schedule.for_spec(prepared.spec, scale.rows, longest, "cpu")
    return Work(base, prepared.spec, schedule, rows, every, prepared.resident_limit)


def base_in(cache: Path) -> BaseModelDescription:
    """SmolLM2-135M, found by name, because the cache may contain other models."""
    for path in sorted((cache / "models").glob("*/description.json")):
        described = BaseModelDescription.model_validate(json.loads(path.read_text("utf-8")))
        if described.name == "smollm2-135m":
            return described
    raise SystemExit(f"no base model smollm2-135m in {cache}; run `make model`")


def dataset() -> Path:
    """The path of the real trajectories. They have another licence, so they are not part of the project."""
    for place in PLACES:
        path = ROOT / place / "data" / "react_fever_270.csv"
        if path.exists():
            return path
    raise SystemExit("react_fever_270.csv is not there; give it with --csv")
