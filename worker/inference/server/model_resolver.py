"""Resolves a digest into the model that the engine loads: from what the application has published, or from a table."""

from collections.abc import Sequence
from typing import Any, Protocol

from app.composition import Services
from app.domain.adapters import Manifest
from app.domain.base_models import canonical_digest
from app.domain.errors import NotFoundError
from app.domain.jobs import Job
from app.domain.specs import TrainSpec
from app.domain.tuning_methods import Quantization, shares_its_base
from worker.bases import ensure_base
from worker.inference.errors import ModelNotFound
from worker.inference.sampling_params import ServedModel
from worker.inference.server.preloader import PreloadSource

SERVED_QUANTIZATIONS: tuple[Quantization | None, ...] = (
    Quantization(),
    None,
    Quantization(double_quant=False),
    Quantization(quant_type="fp4"),
    Quantization(quant_type="fp4", double_quant=False),
    Quantization(bits=8),
)
"""The quantisations at which a base is served."""


class ModelResolver(PreloadSource, Protocol):
    """Digest → model. Called in a thread; the caller remembers the result."""

    def resolve(self, digest: str) -> ServedModel:
        """The model. Raises ModelNotFound."""
        ...


class StaticResolver:
    """A fixed table of models, of which some are preloaded: for a machine without the application, and for tests."""

    def __init__(self, models: dict[str, ServedModel], preload: Sequence[str] = ()) -> None:
        self._models = models
        self._preload = [models[digest] for digest in preload]

    def models_to_preload(self) -> list[ServedModel]:
        """Always the same."""
        return self._preload

    def resolve(self, digest: str) -> ServedModel:
        """The model. Raises ModelNotFound."""
        if digest not in self._models:
            raise ModelNotFound(digest)
        return self._models[digest]


class PublishedResolver:
    """Looks a digest up among the published adapters, then among the served bases. Brings their files to this host."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def resolve(self, digest: str) -> ServedModel:
        """The model. Raises ModelNotFound."""
        return self._find_adapter(digest) or self._find_base(digest)

    def models_to_preload(self) -> list[ServedModel]:
        """The default adapter, and the base of the newest job, whose adapter will be asked for."""
        default = self._services.adapters.default()
        newest, _ = self._services.jobs.list_jobs(None, 1, None)
        known = [self._find_adapter(default.digest) if default else None, *map(self._base_of_job, newest)]
        return [model for model in known if model is not None]

    def _base_of_job(self, job: Job) -> ServedModel | None:
        if not isinstance(job.spec, TrainSpec) or not shares_its_base(job.spec.adapter):
            return None
        base = self._services.base_models.get(job.spec.base_model)
        digest = self._services.base_models.served_digest(base, job.spec.quantization)
        return self._build_served_model(digest, base.digest, job.spec.quantization, None)

    def _find_adapter(self, digest: str) -> ServedModel | None:
        try:
            row = self._services.adapters.by_digest(digest)
        except NotFoundError:
            return None
        manifest = Manifest.model_validate(row.manifest)
        directory = str(self._services.adapters.on_disk(digest))
        spec = TrainSpec.model_validate(manifest.spec)
        served = self._build_served_model(digest, manifest.base.digest, spec.quantization, directory)
        if manifest.kind == "full":
            return served.model_copy(update={"base_digest": digest, "base_path": directory, "adapter_path": None})
        if shares_its_base(spec.adapter):
            return served
        return served.model_copy(update={"base_digest": canonical_digest([served.base_digest, digest])})

    def _find_base(self, digest: str) -> ServedModel:
        for view in self._services.base_models.list_base_models():
            row = self._services.base_models.get(view.name)
            for quantization in SERVED_QUANTIZATIONS:
                if self._services.base_models.served_digest(row, quantization) == digest:
                    return self._build_served_model(digest, row.digest, quantization, None)
        raise ModelNotFound(digest)

    def _build_served_model(
        self, digest: str, base: str, quantization: Quantization | None, adapter: str | None
    ) -> ServedModel:
        row = self._services.base_models.by_digest(base)
        described = self._services.base_models.describe(row)
        return ServedModel(
            digest=digest,
            base_digest=self._services.base_models.served_digest(row, quantization),
            base_path=str(ensure_base(described, self._services.settings.cache_path)),
            quantization=_engine_quantization(quantization),
            adapter_path=adapter,
            max_model_len=described.context_length,
        )


def _engine_quantization(quantization: Quantization | None) -> dict[str, Any] | None:
    if quantization is None:
        return None
    return {"bits": quantization.bits, "type": quantization.quant_type, "double": quantization.double_quant}
