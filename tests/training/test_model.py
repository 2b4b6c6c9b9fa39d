"""The base as it is trained on: its numbers, what is frozen, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file

from app.domain import memory
from app.domain.attempts import EncodedRow
from app.domain.specs import TrainSpec
from tests.tiny import make_tiny_model
from worker.precision import BF16, FP32, Precision
from worker.training.batches import collate
from worker.training.errors import TrainingError
from worker.training.master_weights import MasterWeights
from worker.training.model import TrainableModel, load_trainable_model

LAYER = "model.layers.1.mlp.up_proj.weight"


def load(base: Path, precision: Precision = FP32, **spec: object) -> TrainableModel:
    asked = TrainSpec.model_validate({"dataset": "d", **spec})
    return load_trainable_model(base, asked, 30, precision, torch.device("cpu"), lambda _: None)


def frozen(loaded: TrainableModel, name: str) -> torch.Tensor:
    path, _, leaf = name.removeprefix("model.").rpartition(".")
    return loaded.backbone.get_submodule(path).base_layer.get_parameter(leaf)  # type: ignore[union-attr]


@pytest.mark.parametrize("double", [True, False])
def test_cached_weights_are_the_dequantised_nf4_ones(tiny_base: Path, double: bool) -> None:
    loaded = load(tiny_base, quantization={"double_quant": double})
    weight = load_file(tiny_base / "model.safetensors")[LAYER]
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    assert torch.equal(frozen(loaded, LAYER), dequantize_4bit(packed, state))
    assert not torch.equal(frozen(loaded, LAYER), weight)


def test_a_base_too_large_to_keep_dequantised_computes_the_same(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate([EncodedRow(line=1, ids=tuple(range(40)), trained=())])
    kept = load(tiny_base).hidden(batch)
    monkeypatch.setattr(memory, "KEEP_DEQUANTIZED_UP_TO", 0)
    packed = load(tiny_base)
    assert any(type(module).__name__ == "Linear4bit" for module in packed.method.module.modules())
    torch.testing.assert_close(packed.hidden(batch), kept, rtol=1e-4, atol=1e-4)


def test_without_quantisation_the_weights_are_the_stored_ones(tiny_base: Path) -> None:
    loaded = load(tiny_base, quantization=None)
    assert torch.equal(frozen(loaded, LAYER), load_file(tiny_base / "model.safetensors")[LAYER])


def test_only_lora_is_trainable_and_every_linear_layer_but_the_head_has_it(tiny_base: Path) -> None:
    names = load(tiny_base).method.parameters()
    assert len(names) == 2 * 7 * 2
    assert all("lora_" in name for name in names)


def test_the_lora_options_of_the_spec_arrive(tiny_base: Path) -> None:
    adapter = {"type": "lora", "r": 3, "alpha": 5, "dropout": 0.1, "use_rslora": True, "target_modules": ["q_proj"]}
    module: Any = load(tiny_base, adapter=adapter).method.module
    config = module.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 5, 0.1, True)
    assert config.target_modules == {"q_proj"}


def test_compute_in_bfloat16_keeps_masters_in_float32(tiny_base: Path) -> None:
    loaded = load(tiny_base, BF16)
    masters = MasterWeights(loaded.method.parameters(), BF16.compute)
    assert {p.dtype for p in loaded.method.parameters().values()} == {torch.bfloat16}
    assert masters.flat.dtype == torch.float32
    masters.flat.data.fill_(1 + 2**-12)
    masters.refresh()
    assert all(bool((p == 1).all()) for p in loaded.method.parameters().values())
    assert all(bool((value == 1 + 2**-12).all()) for value in masters.by_name().values())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_parameter_of_any_size_leaves_the_next_where_kernels_can_read_it(compute: torch.dtype) -> None:
    parameters = {str(size): torch.nn.Parameter(torch.full((size,), float(size))) for size in (1, 33, 7, 64)}
    masters = MasterWeights(parameters, compute)
    assert all(parameter.data_ptr() % 16 == 0 for parameter in parameters.values())
    assert masters.count == 105
    assert all(torch.equal(masters.value(name), parameter.float()) for name, parameter in parameters.items())


def test_gradients_of_micro_batches_are_accumulated_in_float32(tiny_base: Path) -> None:
    loaded = load(tiny_base, BF16)
    masters = MasterWeights(loaded.method.parameters(), BF16.compute)
    for size in (1.0, 2.0**-10):
        for parameter in loaded.method.parameters().values():
            assert parameter.grad is not None
            parameter.grad += size
        masters.collect()
    assert bool((masters.gradient == 1 + 2**-10).all())


@pytest.mark.parametrize("modules", [["no_such"], ["q_proj", "no_such"]])
def test_target_modules_that_match_nothing_are_refused(tiny_base: Path, modules: list[str]) -> None:
    with pytest.raises(TrainingError, match="no_such") as refused:
        load(tiny_base, adapter={"type": "lora", "target_modules": modules})
    assert refused.value.code == "target_modules"
    assert "q_proj" in str(refused.value.hint)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_is_refused(tmp_path: Path, bad: float) -> None:
    base = make_tiny_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights[LAYER][0, 0] = bad
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=LAYER) as refused:
        load(base)
    assert refused.value.code == "base_not_finite"


def test_a_missing_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as refused:
        load(tmp_path)
    assert refused.value.code == "base_not_loadable"
