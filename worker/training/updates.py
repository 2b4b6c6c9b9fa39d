"""One update: gradient accumulation over micro-batches that fit the device's memory, then the optimizer's step."""

import math
from collections.abc import Callable

import torch

from app.domain.attempts import EncodedRow, LogMessage, TrainOrder
from worker.training.batches import MicroBatch, batches_of_update
from worker.training.channel import Channel
from worker.training.loss import backward_loss
from worker.training.master_weights import MasterWeights
from worker.training.memory import find_max_tokens, fits_in_memory, halve_max_tokens
from worker.training.model import TrainableModel
from worker.training.state import RunState


def find_micro_batch_size(
    trainable: TrainableModel, state: RunState, rows: list[EncodedRow], order: TrainOrder, channel: Channel
) -> None:
    """On a GPU with `batch_size: auto`, find the largest micro-batch that fits, before the first update."""
    if state.device.type != "cuda" or state.progress.max_tokens or order.spec.trainer.batch_size != "auto":
        return

    def run(batch: MicroBatch) -> None:
        backward(trainable, state, [batch])

    generators = state.get_generators()
    size = find_max_tokens(run, rows, order.schedule.max_rows, order.schedule.max_tokens)
    state.masters.reset()
    state.set_generators(generators)
    state.progress.max_tokens = size
    channel.send(LogMessage(message=f"micro-batches of up to {size} tokens fit", data={"max_tokens": size}))


def accumulate_gradients(
    trainable: TrainableModel, state: RunState, rows: list[EncodedRow], update: int, order: TrainOrder, channel: Channel
) -> tuple[float, int, int] | None:
    """Sum the update's gradients in the master weights. Returns (mean loss, tokens, labelled tokens).

    If memory does not suffice, the update starts again with half the micro-batch. Returns None if a `pause` or `stop`
    arrived between two micro-batches. Gradients and generators are then as before the update, so that a resumed run
    repeats it exactly. Raises MemoryError if a single row does not fit.
    """
    while True:
        limits = order.schedule.model_copy(
            update={"max_tokens": state.progress.max_tokens or order.schedule.max_tokens}
        )
        batches = batches_of_update(rows, update, limits, order.spec.seed, order.spec.trainer.verdict_weight)
        generators, loss_sums = state.get_generators(), list[float]()
        fits = fits_in_memory(
            lambda: loss_sums.extend(backward(trainable, state, batches, channel.must_exit))  # noqa: B023  called here
        )
        if fits and loss_sums:
            state.row_losses.record((line for batch in batches for line in batch.lines), loss_sums, update)
            loss = math.fsum(loss_sums) / sum(batch.total_weight for batch in batches)
            return loss, sum(batch.tokens for batch in batches), sum(batch.labelled for batch in batches)
        state.masters.reset()
        state.set_generators(generators)
        if fits:
            return None
        half = halve_max_tokens(batches)
        if half is None:
            raise MemoryError("a micro-batch of a single row does not fit into memory")
        state.progress.max_tokens = half
        message = f"update {update} ran out of memory; micro-batches now have at most {half} tokens"
        channel.send(
            LogMessage(
                level="warning", message=f"{message}; the effective batch stays the same", data={"max_tokens": half}
            )
        )


def backward(
    trainable: TrainableModel,
    state: RunState,
    batches: list[MicroBatch],
    should_stop: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Backpropagate the weighted mean loss of `batches` into the master weights. Returns each row's weighted loss sum.

    `should_stop` is called before each micro-batch; if it is true, the result is empty.
    """
    total = sum(batch.total_weight for batch in batches)
    weight = state.scaler.scale(torch.ones((), device=state.device)) / total
    loss_sums: list[torch.Tensor] = []  # [num_rows] for each micro-batch
    for batch in batches:
        if should_stop():
            return []
        state.heap.trim_if_grown()
        loss_sums.append(backward_micro_batch(trainable, state.masters, batch, weight))
    sums: list[float] = torch.cat(
        loss_sums
    ).tolist()  # the only synchronisation with the device in an update's gradients
    return sums


def backward_micro_batch(
    trainable: TrainableModel,
    masters: MasterWeights,
    batch: MicroBatch,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Add a micro-batch's gradients, times `weight`, to those of the master weights.

    Returns each row's weighted loss sum, [num_rows]. Does not synchronise with the device of `weight`.
    """
    on_device = batch.to(weight.device)
    loss_sums = backward_loss(trainable.hidden(on_device), trainable.head, on_device, weight)
    masters.collect()
    return loss_sums


def gradient_norm(state: RunState) -> float:
    """Unscale the gradients, add AdaLoRA's orthogonality penalty, and return the norm of all gradients."""
    if state.scaler.is_enabled():
        state.scaler.unscale_(state.optimizer)
    if state.rank_allocator is not None:
        state.rank_allocator.regularise()
    return float(state.masters.gradient.norm())


def optimizer_step(state: RunState, rate: float, norm: float, max_norm: float | None) -> None:
    """Clip the gradients, whose norm is `norm`, to `max_norm`, and update the weights with learning rate `rate`."""
    if max_norm is not None and norm > max_norm:
        state.masters.gradient.mul_(max_norm / norm)
    state.optimizer.param_groups[0]["lr"] = rate
    state.scaler.step(state.optimizer)
    state.masters.refresh()
