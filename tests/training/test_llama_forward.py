"""llama_forward gives the same hidden states and gradients as transformers and PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from app.domain import memory
from app.domain.memory import TOKEN_MULTIPLE
from app.domain.specs import TrainSpec
from tests.tiny import make_tiny_model
from tests.training.conftest import make_rows, unpack
from worker.precision import FP32
from worker.training import attention, llama_forward
from worker.training.batches import MicroBatch, collate
from worker.training.fused_lora import FusedLoraLinear
from worker.training.llama_forward import LlamaTrainingForward
from worker.training.model import TrainableModel, load_trainable_model

ROWS = make_rows(8)
SHAPE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
FAMILY: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "llama with a head dimension and scaled positions of its own": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SHAPE,
            head_dim=12,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
}


def loaded(base: Path, **spec: object) -> TrainableModel:
    """In float32, with LoRA layers that are not zero."""
    torch.manual_seed(5)
    asked = TrainSpec.model_validate(
        {"dataset": "d", "adapter": {"type": "lora", "r": 4}, "quantization": None, **spec}
    )
    trainable = load_trainable_model(base, asked, 30, FP32, torch.device("cpu"), lambda _: None)
    for parameter in trainable.method.parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    return trainable


def run(trainable: TrainableModel, hidden: Callable[[MicroBatch], torch.Tensor]) -> list[torch.Tensor]:
    """The hidden states of packed rows, and every parameter's gradient of a weighted sum of them."""
    trainable.method.module.zero_grad()
    states = hidden(collate(ROWS))
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    (states * weights).sum().backward()  # type: ignore[no-untyped-call]
    return [states.detach(), *(p.grad.clone() for p in trainable.method.parameters().values() if p.grad is not None)]


def one_by_one(trainable: TrainableModel) -> Callable[[MicroBatch], torch.Tensor]:
    """Stock PEFT over each sequence alone; of a branch's sequence only the branch's own tokens are taken."""

    def hidden(_batch: MicroBatch) -> torch.Tensor:
        found = []
        sequences = iter(unpack(ROWS))
        for row in ROWS:
            ids = [next(sequences).ids] + ([next(sequences).ids] if row.branch else [])
            whole, *branch = (trainable.backbone(input_ids=torch.tensor([i])).last_hidden_state[0] for i in ids)
            found += [whole, *(states[-len(row.branch.ids) :] for states in branch if row.branch)]
        return torch.cat(found)

    return hidden


def save(base: Path, model: Any) -> Path:
    make_tiny_model(base)
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)  # norms and biases as trained ones are: not all alike
    model.save_pretrained(base)
    return base


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("architecture", FAMILY)
def test_states_and_gradients_are_those_of_stock_peft(tmp_path: Path, architecture: str, recompute: bool) -> None:
    trainable = loaded(save(tmp_path, FAMILY[architecture]()), trainer={"enable_gradient_checkpointing": recompute})
    assert isinstance(trainable.hidden, LlamaTrainingForward)
    for mine, theirs in zip(run(trainable, trainable.hidden), run(trainable, one_by_one(trainable)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("shift", [0, 1, TOKEN_MULTIPLE - 1])
def test_padding_of_a_batch_changes_nothing(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    """The batch is rounded up by no token, by one, and by all but one."""
    trainable = loaded(tiny_base)
    tokens = collate(ROWS).tokens
    monkeypatch.setattr(llama_forward, "TOKEN_MULTIPLE", 1)
    plain = run(trainable, trainable.hidden)
    assert plain[0].shape[0] == tokens
    monkeypatch.setattr(llama_forward, "TOKEN_MULTIPLE", tokens + shift)
    for mine, theirs in zip(run(trainable, trainable.hidden), plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_layers_see_few_different_numbers_of_tokens(tiny_base: Path) -> None:
    trainable, seen = loaded(tiny_base), list[int]()
    module: Any = trainable.backbone
    module.embed_tokens.register_forward_hook(lambda _module, _given, states: seen.append(states.shape[0]))
    for rows in range(1, len(ROWS) + 1):
        batch = collate(ROWS[:rows])
        assert trainable.hidden(batch).shape[0] == batch.tokens
        assert 0 <= seen[-1] - batch.tokens < TOKEN_MULTIPLE
    assert {tokens % TOKEN_MULTIPLE for tokens in seen} == {0}


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["down_proj"], ["k_proj", "o_proj", "gate_proj"]])
def test_layers_without_an_adapter_are_passed_through(tiny_base: Path, modules: list[str]) -> None:
    trainable = loaded(tiny_base, adapter={"type": "lora", "r": 4, "use_rslora": True, "target_modules": modules})
    assert isinstance(trainable.hidden, LlamaTrainingForward)
    for mine, theirs in zip(run(trainable, trainable.hidden), run(trainable, one_by_one(trainable)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("block", [1, 5, 16])
def test_scores_block_by_block_give_the_same(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    trainable = loaded(tiny_base)
    assert any(row.branch for row in ROWS)
    monkeypatch.setattr(memory, "QUERY_BLOCK", block)
    for mine, theirs in zip(run(trainable, trainable.hidden), run(trainable, one_by_one(trainable)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_the_fused_kernel_gives_the_same(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainable = loaded(tiny_base)
    plain = run(trainable, trainable.hidden)
    monkeypatch.setattr(attention, "PLAIN_ATTENTION_UP_TO", 0)
    for mine, theirs in zip(run(trainable, trainable.hidden), plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


DROPOUT = {"type": "lora", "r": 4, "dropout": 0.3}


def test_without_training_nothing_is_dropped(tiny_base: Path) -> None:
    trainable = loaded(tiny_base, adapter=DROPOUT)
    assert isinstance(trainable.hidden, LlamaTrainingForward)
    trainable.method.module.eval()
    for mine, theirs in zip(run(trainable, trainable.hidden), run(trainable, one_by_one(trainable)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_dropout_follows_the_global_generator_and_is_the_same_when_recomputed(tiny_base: Path) -> None:
    def seeded(recompute: bool, seed: int) -> list[torch.Tensor]:
        trainable = loaded(tiny_base, adapter=DROPOUT, trainer={"enable_gradient_checkpointing": recompute})
        torch.manual_seed(seed)
        return run(trainable, trainable.hidden)

    first, again, recomputed, other = seeded(False, 1), seeded(False, 1), seeded(True, 1), seeded(False, 2)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(first, recomputed, strict=True))
    assert not torch.equal(first[0], other[0])


def test_gradients_are_those_of_the_function_with_its_dropout(tiny_base: Path) -> None:
    """Against differences of the function itself: the same seed drops the same features."""
    trainable = loaded(tiny_base, adapter=DROPOUT)

    def value() -> float:
        torch.manual_seed(3)
        states, *_ = run(trainable, trainable.hidden)
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
        return float((states.double() * weights).sum())

    torch.manual_seed(3)
    _, *gradients = run(trainable, trainable.hidden)
    for parameter, gradient in zip(trainable.method.parameters().values(), gradients, strict=True):
        direction = gradient / gradient.norm()
        step = 1e-3
        parameter.data.add_(direction, alpha=step)
        above = value()
        parameter.data.add_(direction, alpha=-2 * step)
        below = value()
        parameter.data.add_(direction, alpha=step)
        assert (above - below) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.03)


def test_the_dropout_rate_is_the_one_asked_for(tiny_base: Path) -> None:
    trainable = loaded(tiny_base, adapter=DROPOUT)
    module: Any = trainable.backbone
    linear = FusedLoraLinear(module.layers[0].mlp.down_proj)
    kept = linear.draw_dropout_mask(torch.zeros(2_000, 1), torch.Generator().manual_seed(0))
    assert kept.shape == (2_000, 128)
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.005)
    assert float(kept.float().mean(0).std()) < 0.02  # no feature is favoured


WINDOWED: dict[str, Callable[[], Any]] = {
    "in all layers": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16)),
    "in some layers": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    ),
}


@pytest.mark.parametrize("windowed", WINDOWED)
def test_a_sliding_window_takes_transformers_forward_and_is_applied(tmp_path: Path, windowed: str) -> None:
    trainable = loaded(save(tmp_path, WINDOWED[windowed]()))
    assert not isinstance(trainable.hidden, LlamaTrainingForward)
    assert max(len(row.ids) for row in ROWS) > 16
    for mine, theirs in zip(run(trainable, trainable.hidden), run(trainable, one_by_one(trainable)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
