"""The loss and its gradients: the same in chunks, over micro-batches, and with recomputed activations."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from app.domain.attempts import EncodedRow
from app.domain.specs import TrainSpec
from tests.training.conftest import make_rows, unpack
from worker.precision import FP32
from worker.training.batches import MicroBatch, collate, pack_micro_batches, shifted_labels
from worker.training.loss import backward_loss, measure_loss
from worker.training.model import TrainableModel, load_trainable_model


def trainable(base: Path, **trainer: object) -> TrainableModel:
    """The tiny model in float32 over NF4, with LoRA layers that are not zero, so that all of them get gradients."""
    spec = TrainSpec.model_validate({"dataset": "d", "adapter": {"type": "lora", "r": 4}, "trainer": trainer})
    torch.manual_seed(3)
    loaded = load_trainable_model(base, spec, 30, FP32, torch.device("cpu"), lambda _: None)
    for parameter in loaded.method.parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    return loaded


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> TrainableModel:
    return trainable(tiny_base)


ROWS = make_rows(8)


def backward(
    model: TrainableModel, batches: list[MicroBatch], chunk: int = 512
) -> tuple[float, dict[str, torch.Tensor]]:
    """(weighted mean loss, its gradients) of one update."""
    weights = sum(batch.total_weight for batch in batches)
    model.method.module.zero_grad()
    total = 0.0
    for batch in batches:
        hidden = model.hidden(batch)
        total += float(backward_loss(hidden, model.head, batch, 1 / weights, chunk).sum())
    gradients = {name: p.grad.clone() for name, p in model.method.parameters().items() if p.grad is not None}
    return total / weights, gradients


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    scale = max(float(gradient.abs().max()) for gradient in one.values())
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5 * scale) for name in one
    )


@pytest.mark.parametrize("verdict_weight", [1.0, 20.0])
def test_it_is_the_loss_of_each_sequence_read_alone(model: TrainableModel, verdict_weight: float) -> None:
    """Packed rows and shared beginnings change nothing: stock PEFT, one sequence at a time, gives the same."""
    loss, gradients = backward(model, [collate(ROWS, verdict_weight)], 7)
    model.method.module.zero_grad()
    alone = unpack(ROWS)
    labels = {id(row): shifted_labels(row) for row in alone}
    weights = sum(map(len, labels.values())) + (verdict_weight - 1) * len(
        alone
    )  # each of these sequences has one verdict
    expected = 0.0
    for row in alone:
        logits = model.method.module(input_ids=torch.tensor([row.ids])).logits[0]
        places = torch.tensor([label.predictor for label in labels[id(row)]])
        losses = cross_entropy(logits[places], torch.tensor(row.ids)[places + 1], reduction="none")
        own = labels[id(row)]
        factors = torch.tensor([verdict_weight if label.predictor + 1 == row.verdict else 1.0 for label in own])
        weighted = losses @ factors / weights
        weighted.backward()  # type: ignore[no-untyped-call]
        expected += float(weighted.detach())
    assert loss == pytest.approx(expected, rel=1e-5)
    assert same(gradients, {n: p.grad for n, p in model.method.parameters().items() if p.grad is not None})


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_chunks_change_nothing(model: TrainableModel, chunk: int) -> None:
    batch = collate(ROWS)
    whole, in_chunks = backward(model, [batch]), backward(model, [batch], chunk)
    assert in_chunks[0] == pytest.approx(whole[0], rel=1e-6)
    assert same(whole[1], in_chunks[1])


@pytest.mark.parametrize("chunk", [5, 512])
def test_each_rows_sum_is_its_own(model: TrainableModel, chunk: int) -> None:
    """A chunk's border may lie within a row; measured without a gradient, the sums are the same."""
    alone = [float(backward_loss(model.hidden(one), model.head, one, 1.0)) for one in (collate([row]) for row in ROWS)]
    batch = collate(ROWS)
    assert backward_loss(model.hidden(batch), model.head, batch, 1.0, chunk).tolist() == pytest.approx(alone, rel=1e-5)
    with torch.no_grad():
        measured, hits = measure_loss(model.hidden(batch), model.head, batch, chunk)
        logits = model.head(model.hidden(batch)[batch.predictors])
    assert measured.tolist() == pytest.approx(alone, rel=1e-5)
    assert hits.tolist() == (logits.argmax(-1) == batch.targets).tolist()


@pytest.mark.parametrize("max_tokens", [1, 60, 130])
def test_accumulation_equals_one_big_batch(model: TrainableModel, max_tokens: int) -> None:
    groups = pack_micro_batches([len(row.all_ids) for row in ROWS], None, max_tokens)
    assert len(groups) > 1
    pieces = [collate([ROWS[index] for index in group]) for group in groups]
    whole, accumulated = backward(model, [collate(ROWS)]), backward(model, pieces)
    assert accumulated[0] == pytest.approx(whole[0], rel=1e-6)
    assert same(whole[1], accumulated[1])


def test_a_batch_without_labels_adds_nothing(model: TrainableModel) -> None:
    silent = collate([EncodedRow(line=1, ids=(5, 6, 7), trained=())])
    batch = collate(ROWS)
    assert same(backward(model, [batch])[1], backward(model, [batch, silent])[1])


def test_every_lora_parameter_gets_the_same_gradient_with_and_without_checkpointing(
    tiny_base: Path, model: TrainableModel
) -> None:
    checkpointed = trainable(tiny_base, enable_gradient_checkpointing=True)
    for mine, theirs in zip(checkpointed.method.parameters().values(), model.method.parameters().values(), strict=True):
        mine.data.copy_(theirs.data)
    batch = collate(ROWS)
    plain, recomputed = backward(model, [batch]), backward(checkpointed, [batch])
    assert len(plain[1]) == len(model.method.parameters())
    assert all(gradient.abs().max() > 0 for gradient in plain[1].values())
    assert same(plain[1], recomputed[1])
