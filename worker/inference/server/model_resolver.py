"""Digest → what the engine loads, from what the application has published. Asked on demand; nobody pushes."""

from typing import Any

from app.composition import Services
from app.domain.adapters import Manifest
from app.domain.base_models import canonical_digest
from app.domain.errors import NotFoundError
from app.domain.jobs import Job
from app.domain.specs import TrainSpec
from app.domain.tuning_methods import Quantization, shares_its_base
from worker.bases import ensure_base
from worker.inference.protocol import ServedModel
from worker.inference.server.app import ModelNotFound

SERVED: tuple[Quantization | None, ...] = (
    Quantization(),
    None,
    Quantization(double_quant=False),
    Quantization(quant_type="fp4"),
    Quantization(quant_type="fp4", double_quant=False),
    Quantization(bits=8),
)
"""The quantisations at which a base may be asked for."""


class PublishedResolver:
    """Looks an adapter up by its digest, then the served bases; files are brought to this host as needed."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def resolve(self, digest: str) -> ServedModel:
        """Raises ModelNotFound."""
        return self._adapter(digest) or self._base(digest)

    def expected(self) -> list[ServedModel]:
        """What answers when no adapter is named, and the base of the newest job, whose adapter will be asked for."""
        default = self._services.adapters.default()
        newest, _ = self._services.jobs.page(None, 1, None)
        known = [self._adapter(default.digest) if default else None, *map(self._trained_over, newest)]
        return [model for model in known if model is not None]

    def _trained_over(self, job: Job) -> ServedModel | None:
        if not shares_its_base(job.spec.adapter):
            return None
        base = self._services.base_models.get(job.spec.base_model)
        digest = self._services.base_models.served_digest(base, job.spec.quantization)
        return self._served(digest, base.digest, job.spec.quantization, None)

    def _adapter(self, digest: str) -> ServedModel | None:
        try:
            row = self._services.adapters.by_digest(digest)
        except NotFoundError:
            return None
        manifest = Manifest.model_validate(row.manifest)
        directory = str(self._services.adapters.on_disk(digest))
        spec = TrainSpec.model_validate(manifest.spec)
        served = self._served(digest, manifest.base.digest, spec.quantization, directory)
        if manifest.kind == "full":
            return served.model_copy(update={"base_digest": digest, "base_path": directory, "adapter_path": None})
        if shares_its_base(spec.adapter):
            return served
        return served.model_copy(update={"base_digest": canonical_digest([served.base_digest, digest])})

    def _base(self, digest: str) -> ServedModel:
        for view in self._services.base_models.all():
            row = self._services.base_models.get(view.name)
            for quantization in SERVED:
                if self._services.base_models.served_digest(row, quantization) == digest:
                    return self._served(digest, row.digest, quantization, None)
        raise ModelNotFound(digest)

    def _served(self, digest: str, base: str, quantization: Quantization | None, adapter: str | None) -> ServedModel:
        row = self._services.base_models.by_digest(base)
        described = self._services.base_models.describe(row)
        return ServedModel(
            digest=digest,
            base_digest=self._services.base_models.served_digest(row, quantization),
            base_path=str(ensure_base(described, self._services.settings.cache_path)),
            quantization=_engine_words(quantization),
            adapter_path=adapter,
            max_model_len=described.context_length,
        )


def _engine_words(quantization: Quantization | None) -> dict[str, Any] | None:
    if quantization is None:
        return None
    return {"bits": quantization.bits, "type": quantization.quant_type, "double": quantization.double_quant}
