"""One update: its gradients, in as many micro-batches as the device's memory asks for, and the step they lead to."""

import math
from collections.abc import Callable

import torch

from app.domain.attempts import EncodedRow, LogMessage, TrainOrder
from worker.training.batches import MicroBatch, batches_of_update
from worker.training.channel import Channel
from worker.training.loss import backward_loss
from worker.training.master_weights import MasterWeights
from worker.training.memory import largest_that_fits, smaller, suffices
from worker.training.model import TrainableModel
from worker.training.state import RunState


def probe(
    trainable: TrainableModel, state: RunState, rows: list[EncodedRow], order: TrainOrder, channel: Channel
) -> None:
    """On a GPU, find out before the first update which micro-batch fits, where the spec leaves that to us."""
    if state.device.type != "cuda" or state.progress.max_tokens or order.spec.trainer.batch_size != "auto":
        return

    def run(batch: MicroBatch) -> None:
        backward(trainable, state, [batch], batch.labelled)

    generators = state.generators()
    size = largest_that_fits(run, rows, order.schedule.max_rows, order.schedule.max_tokens)
    state.masters.reset()
    state.use(generators)
    state.progress.max_tokens = size
    channel.tell(LogMessage(message=f"micro-batches of up to {size} tokens fit", data={"max_tokens": size}))


def add_gradients(
    trainable: TrainableModel, state: RunState, rows: list[EncodedRow], update: int, order: TrainOrder, channel: Channel
) -> tuple[float, int, int] | None:
    """(the update's mean loss, its tokens, those with a label); its gradients are added up in the masters.

    Too little memory halves the micro-batch and begins the update again. None when a `pause` or `stop` arrived between
    two micro-batches: gradients and generators are then as they were before the update, so a resume repeats it exactly.
    """
    while True:
        limits = order.schedule.model_copy(
            update={"max_tokens": state.progress.max_tokens or order.schedule.max_tokens}
        )
        batches = batches_of_update(rows, update, limits, order.spec.seed)
        labelled = sum(batch.labelled for batch in batches)
        generators, sums = state.generators(), list[float]()
        fits = suffices(
            lambda: sums.extend(backward(trainable, state, batches, labelled, channel.must_leave))  # noqa: B023  called here
        )
        if fits and sums:
            state.rows.note((line for batch in batches for line in batch.lines), sums, update)
            return math.fsum(sums) / labelled, sum(batch.tokens for batch in batches), labelled
        state.masters.reset()
        state.use(generators)
        if fits:
            return None
        half = smaller(batches)
        if half is None:
            raise MemoryError("a single row does not fit")
        state.progress.max_tokens = half
        told = f"memory did not suffice for update {update}: micro-batches have at most {half} tokens from here on"
        channel.tell(
            LogMessage(level="warning", message=f"{told}; the effective batch stays", data={"max_tokens": half})
        )


def backward(
    trainable: TrainableModel,
    state: RunState,
    batches: list[MicroBatch],
    labelled: int,
    cut_short: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Each row's summed loss; the gradients of their mean over `labelled` tokens are added up in the masters.

    Empty when `cut_short`, asked before each micro-batch, said so.
    """
    weight = state.scaler.scale(torch.ones((), device=state.device)) / labelled
    by_row: list[torch.Tensor] = []
    for batch in batches:
        if cut_short():
            return []
        by_row.append(micro_step(trainable, state.masters, batch, weight))
    sums: list[float] = torch.cat(by_row).tolist()  # the first and only wait for the device in all micro-batches
    return sums


def micro_step(
    trainable: TrainableModel, masters: MasterWeights, batch: MicroBatch, weight: torch.Tensor
) -> torch.Tensor:
    """Each row's summed loss, [rows]; its gradients times `weight` are added to the masters'. Nothing in here waits for
    the device of `weight`."""
    there = batch.to(weight.device)
    by_row = backward_loss(trainable.hidden(there), trainable.head, there, weight)
    masters.collect()
    return by_row


def gradient_norm(state: RunState) -> float:
    """Of the whole update, without the loss scale."""
    if state.scaler.is_enabled():
        state.scaler.unscale_(state.optimizer)
    if state.ranks is not None:
        state.ranks.regularise()
    return float(state.masters.gradient.norm())


def step(state: RunState, rate: float, norm: float, limit: float | None) -> None:
    """Change the weights by the update's gradients, clipped to a norm of `limit`."""
    if limit is not None and norm > limit:
        state.masters.gradient.mul_(limit / norm)
    state.optimizer.param_groups[0]["lr"] = rate
    state.scaler.step(state.optimizer)
    state.masters.refresh()
