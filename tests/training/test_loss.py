"""The loss and its gradients: the same in chunks, over micro-batches, and with recomputed activations."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from app.domain.attempts import EncodedSequence
from app.domain.specs import TrainSpec
from tests.training.conftest import make_rows
from worker.precision import FP32
from worker.training.batches import Batch, collate, micro_batches
from worker.training.loss import backward_loss
from worker.training.model import Trainee, load_trainee


def trainee(base: Path, **trainer: object) -> Trainee:
    """The tiny model in float32 over NF4, with LoRA layers that are not zero, so that all of them get gradients."""
    spec = TrainSpec.model_validate({"dataset": "d", "adapter": {"type": "lora", "r": 4}, "trainer": trainer})
    torch.manual_seed(3)
    loaded = load_trainee(base, spec, FP32, torch.device("cpu"), lambda _: None)
    for parameter in loaded.parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    return loaded


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Trainee:
    return trainee(tiny_base)


SEQUENCES = [sequence for row in make_rows(8) for sequence in row.sequences]


def backward(model: Trainee, batches: list[Batch], chunk: int = 512) -> tuple[float, dict[str, torch.Tensor]]:
    """(mean loss, gradients) of one update."""
    labelled = sum(batch.labelled for batch in batches)
    model.peft.zero_grad()
    total = 0.0
    for batch in batches:
        hidden = model.hidden(batch.ids)
        total += float(backward_loss(hidden, model.head, batch.predictors, batch.targets, 1 / labelled, chunk))
    gradients = {name: p.grad.clone() for name, p in model.parameters().items() if p.grad is not None}
    return total / labelled, gradients


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    scale = max(float(gradient.abs().max()) for gradient in one.values())
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5 * scale) for name in one
    )


def test_it_is_the_loss_of_all_logits_at_the_labelled_positions(model: Trainee) -> None:
    batch = collate(SEQUENCES, pad_id=2)
    loss, gradients = backward(model, [batch])
    labels = torch.full_like(batch.ids, -100).flatten()
    labels[batch.predictors + 1] = batch.targets
    labels = labels.view_as(batch.ids)
    model.peft.zero_grad()
    attention = torch.tensor([[i < len(s.ids) for i in range(batch.ids.shape[1])] for s in SEQUENCES]).long()
    logits = model.peft(input_ids=batch.ids, attention_mask=attention).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert same(gradients, {n: p.grad for n, p in model.parameters().items() if p.grad is not None})


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_chunks_change_nothing(model: Trainee, chunk: int) -> None:
    batch = collate(SEQUENCES, pad_id=2)
    whole, in_chunks = backward(model, [batch]), backward(model, [batch], chunk)
    assert in_chunks[0] == pytest.approx(whole[0], rel=1e-6)
    assert same(whole[1], in_chunks[1])


@pytest.mark.parametrize("max_tokens", [1, 60, 130])
def test_accumulation_equals_one_big_batch(model: Trainee, max_tokens: int) -> None:
    groups = micro_batches([len(s.ids) for s in SEQUENCES], None, max_tokens)
    assert len(groups) > 1
    pieces = [collate([SEQUENCES[index] for index in group], pad_id=2) for group in groups]
    whole, accumulated = backward(model, [collate(SEQUENCES, pad_id=2)]), backward(model, pieces)
    assert accumulated[0] == pytest.approx(whole[0], rel=1e-6)
    assert same(whole[1], accumulated[1])


def test_a_batch_without_labels_adds_nothing(model: Trainee) -> None:
    silent = collate([EncodedSequence(ids=(5, 6, 7), trained=())], pad_id=2)
    batch = collate(SEQUENCES, pad_id=2)
    assert same(backward(model, [batch])[1], backward(model, [batch, silent])[1])


def test_every_lora_parameter_gets_the_same_gradient_with_and_without_checkpointing(
    tiny_base: Path, model: Trainee
) -> None:
    checkpointed = trainee(tiny_base, enable_gradient_checkpointing=True)
    for mine, theirs in zip(checkpointed.parameters().values(), model.parameters().values(), strict=True):
        mine.data.copy_(theirs.data)
    batch = collate(SEQUENCES, pad_id=2)
    plain, recomputed = backward(model, [batch]), backward(checkpointed, [batch])
    assert len(plain[1]) == len(model.parameters())
    assert all(gradient.abs().max() > 0 for gradient in plain[1].values())
    assert same(plain[1], recomputed[1])
