"""Digest → the model that the engine loads, for the adapters of every tuning method."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from app.composition import Services
from app.domain.tuning_methods import Quantization
from tests.api.conftest import lease, make_adapter
from worker.inference.errors import ModelNotFound
from worker.inference.sampling_params import ServedModel
from worker.inference.server.model_resolver import PublishedResolver


@pytest.fixture
def dataset(services: Services, upload: Path) -> str:
    return services.datasets.create(upload, "rows.jsonl", None, "rows", {})[0].id


def published(services: Services, dataset: str, directory: Path, **spec: Any) -> ServedModel:
    """The served model of the adapter that a job with this spec published."""
    services.jobs.submit({"dataset": dataset, "name": directory.name, **spec})
    adapter = services.adapters.get(make_adapter(services, lease(services), directory, directory.name))
    return PublishedResolver(services).resolve(adapter.digest)


def test_lora_adapters_share_their_served_base(services: Services, dataset: str, tmp_path: Path) -> None:
    base = services.base_models.get("tiny")
    lora = published(services, dataset, tmp_path / "one")
    adalora = published(services, dataset, tmp_path / "two", adapter={"type": "adalora"})
    assert lora.base_digest == adalora.base_digest == services.base_models.served_digest(base, Quantization())
    assert lora.quantization == {"bits": 4, "type": "nf4", "double": True}
    assert lora.adapter_path is not None
    assert {path.name for path in Path(lora.adapter_path).iterdir()} >= {"adapter_config.json", "manifest.json"}


def test_an_adapter_that_is_not_lora_owns_its_base(services: Services, dataset: str, tmp_path: Path) -> None:
    asked = {"adapter": {"type": "ia3"}, "quantization": None}
    one, two = (published(services, dataset, tmp_path / name, **asked) for name in ("one", "two"))
    plain = services.base_models.served_digest(services.base_models.get("tiny"), None)
    assert len({one.base_digest, two.base_digest, plain}) == 3
    assert one.base_path == two.base_path
    assert one.adapter_path is not None


def test_a_full_fine_tune_is_its_own_base(services: Services, dataset: str, tmp_path: Path) -> None:
    served = published(services, dataset, tmp_path / "whole", adapter=None, quantization=None)
    assert (served.base_digest, served.adapter_path, served.quantization) == (served.digest, None, None)
    assert (Path(served.base_path) / "model.safetensors").is_file()


@pytest.mark.parametrize("held", [None, Quantization(), Quantization(bits=8), Quantization(quant_type="fp4")])
def test_a_base_is_served_at_each_quantisation(services: Services, held: Quantization | None) -> None:
    digest = services.base_models.served_digest(services.base_models.get("tiny"), held)
    served = PublishedResolver(services).resolve(digest)
    assert (served.digest, served.adapter_path) == (digest, None)
    assert (served.quantization or {}).get("bits") == (held and held.bits)


def test_vllms_adapter_folder_has_only_adapters_that_vllm_serves(
    services: Services, dataset: str, tmp_path: Path
) -> None:
    specs: dict[str, Any] = {
        "plain": {"adapter": {"type": "lora"}},
        "dora": {"adapter": {"type": "lora", "use_dora": True}},
        "whole": {"adapter": None},
    }
    served = {
        name: published(services, dataset, tmp_path / name, quantization=None, **spec) for name, spec in specs.items()
    }
    folder = services.settings.cache_path / "adapters"
    shutil.rmtree(folder)  # other tests' adapters, too, and marks of those that were deleted

    services.adapters.put_on_disk(served["plain"].base_digest)

    assert [directory.name for directory in folder.iterdir()] == [served["plain"].digest]


def test_an_unknown_digest_is_refused(services: Services) -> None:
    with pytest.raises(ModelNotFound):
        PublishedResolver(services).resolve("0" * 64)
