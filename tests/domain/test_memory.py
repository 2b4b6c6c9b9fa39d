"""The memory estimate: sizes from a config.json, and the bytes of each term."""

from typing import Any

import pytest

from app.domain.architectures import PUBLISHED_ARCHITECTURES, Architecture
from app.domain.memory import GPU16, PROCESS_BYTES, Machine, MemoryEstimate, MicroBatchSize, estimate_memory
from app.domain.specs import TrainSpec
from app.domain.trainables import count_trainable_parameters

SEVEN = PUBLISHED_ARCHITECTURES["Llama-2-7B"]
LARGE = 1 << 40
LOAD = MicroBatchSize(1024, 256, 300)


def taken(load: MicroBatchSize = LOAD, *, recompute: bool = False, **spec: Any) -> MemoryEstimate:
    asked = TrainSpec.model_validate({"dataset": "d", **spec})
    return estimate_memory(SEVEN, asked, load, GPU16, recompute=recompute, stored=LARGE)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Llama-2-7B", 6_738_415_616),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Mistral-7B", 7_248_023_552),
        ("Qwen2.5-7B", 7_615_616_512),
        ("SmolLM2-135M", 134_515_008),
    ],
)
def test_published_models_have_their_published_number_of_parameters(name: str, parameters: int) -> None:
    assert PUBLISHED_ARCHITECTURES[name].parameters == parameters


def test_sizes_are_read_from_a_config() -> None:
    config = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
        "vocab_size": 152_064,
        "sliding_window": 131_072,
        "use_sliding_window": False,
    }
    assert Architecture.from_config(config) == PUBLISHED_ARCHITECTURES["Qwen2.5-7B"]
    windowed = Architecture.from_config(config | {"use_sliding_window": True})
    assert windowed is not None
    assert not windowed.is_llama_family


@pytest.mark.parametrize("missing", ["hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"])
def test_a_config_without_a_key_gives_no_sizes(missing: str) -> None:
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 400,
    }
    assert Architecture.from_config(config) is not None
    assert Architecture.from_config({key: value for key, value in config.items() if key != missing}) is None


@pytest.mark.parametrize(
    ("adapter", "parameters"),
    [
        ({"type": "lora", "r": 16}, 39_976_960),
        ({"type": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}, 4_194_304),
        ({"type": "ia3"}, 614_400),
        ({"type": "adaption_prompt", "adapter_len": 10, "adapter_layers": 30}, 1_228_830),
        (None, SEVEN.parameters),
    ],
)
def test_trainable_parameters_equal_what_peft_prints(adapter: Any, parameters: int) -> None:
    spec = TrainSpec.model_validate({"dataset": "d", "adapter": adapter, "quantization": None})
    assert count_trainable_parameters(SEVEN, spec) == parameters


def test_nf4_weights_take_the_published_size() -> None:
    assert 3.5e9 < taken().weights < 3.9e9  # published: 3.6 GB, with double quantisation


def test_fewer_bits_take_less() -> None:
    four, single, eight, none = (
        taken(quantization=quantization).weights
        for quantization in ({"bits": 4}, {"bits": 4, "double_quant": False}, {"bits": 8}, None)
    )
    assert four < single < eight < none == 2 * SEVEN.parameters


def test_what_is_trained_costs_twenty_bytes_a_parameter_in_sixteen_bits() -> None:
    memory = taken()
    assert memory.adapter + memory.gradients + memory.optimizer == 20 * 39_976_960


def test_recompute_saves_only_a_layers_input() -> None:
    whole, inputs = taken().activations, taken(recompute=True).activations
    assert inputs < whole / 4


def test_logits_take_the_memory_of_one_chunk() -> None:
    assert taken(MicroBatchSize(4096, 512, 512)).logits == taken(MicroBatchSize(4096, 512, 4096)).logits
    assert taken(MicroBatchSize(4096, 512, 256)).logits == taken(MicroBatchSize(4096, 512, 512)).logits // 2


def test_terms_that_are_never_in_memory_together_are_not_summed() -> None:
    memory = taken()
    parts = sum(memory.model_dump(exclude={"total"}).values())
    assert memory.total < parts
    assert memory.total > memory.weights + memory.adapter + memory.gradients + memory.optimizer + memory.activations


def test_full_fine_tuning_has_master_weights_and_one_copy() -> None:
    memory = taken(adapter=None, quantization=None)
    assert memory.weights == 2 * SEVEN.parameters
    assert memory.adapter == 4 * SEVEN.parameters


def test_a_small_base_stays_dequantised_on_a_cpu() -> None:
    small = PUBLISHED_ARCHITECTURES["SmolLM2-135M"]
    spec, load = TrainSpec.model_validate({"dataset": "d"}), MicroBatchSize(768, 256, 200)
    dense, packed = (
        estimate_memory(small, spec, load, Machine("cpu", 2), recompute=False, stored=stored)
        for stored in (1 << 28, LARGE)
    )
    assert (dense.weights, dense.quantization_buffers) == (2 * small.linear_parameters, 0)
    assert packed.weights < dense.weights
    assert packed.quantization_buffers > 0


def on_a_cpu(updates: int = 5, compute: int = 2, **spec: Any) -> MemoryEstimate:
    asked = TrainSpec.model_validate({"dataset": "d", **spec})
    small, batch = PUBLISHED_ARCHITECTURES["SmolLM2-135M"], MicroBatchSize(768, 256, 200, updates)
    return estimate_memory(small, asked, batch, Machine("cpu", compute), recompute=False, stored=2 * small.parameters)


def test_a_cpu_counts_the_mapped_file_and_holds_in_memory_what_it_converts() -> None:
    parameters = PUBLISHED_ARCHITECTURES["SmolLM2-135M"].parameters
    mapped, converted = (on_a_cpu(compute=compute, quantization=None) for compute in (2, 4))
    assert (mapped.mapped_files, mapped.weights) == (2 * parameters, 0)
    assert (converted.mapped_files, converted.weights) == (2 * parameters, 4 * parameters)
    assert taken().mapped_files == 0


def test_full_fine_tuning_on_a_cpu_computes_with_a_copy_beside_the_mapped_file() -> None:
    assert on_a_cpu(adapter=None, quantization=None).weights == 2 * PUBLISHED_ARCHITECTURES["SmolLM2-135M"].parameters


def test_a_cpus_heap_grows_with_the_first_updates_and_no_further() -> None:
    reserves = [on_a_cpu(updates).reserve for updates in (1, 3, 5, 500)]
    assert PROCESS_BYTES["cpu"] < reserves[0] < reserves[1] < reserves[2] == reserves[3]
