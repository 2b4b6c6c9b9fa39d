"""Cross-entropy at labelled positions only, in chunks and by row, with its backward pass. It knows no optimizer.

Two thirds of a ReAct trajectory are Observations without a loss: their logits are never computed. A chunk's
logits are freed before the next chunk's are computed, so memory holds one chunk's logits [chunk, vocab] at a time.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from app.domain.memory import LOSS_CHUNK
from worker.training.batches import MicroBatch


def backward_loss(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    batch: MicroBatch,
    weight: float | torch.Tensor,
    chunk: int = LOSS_CHUNK,
) -> torch.Tensor:
    """Backpropagate `weight` × the summed loss through `head` and `hidden`; return each row's sum: [rows].

    The sums are weighted by `batch.loss_weights`. `hidden`: [num_tokens, hidden_size], part of an autograd graph. With
    weight = 1 / (total weight of the update), gradients added up over micro-batches equal those of one big batch.
    """
    by_row = torch.zeros(len(batch.rows), dtype=torch.float32, device=hidden.device)
    # The graph is cut at the predicting positions: each chunk adds its gradient to `leaf` and frees its logits.
    predicting = hidden.index_select(0, batch.predictors)  # [labelled, hidden_size]
    leaf = predicting.detach().requires_grad_()
    for start in range(0, batch.labelled, chunk):
        losses = _weighted_losses(head(leaf[start : start + chunk]).float(), batch, start)
        (losses.sum() * weight).backward()  # type: ignore[no-untyped-call]
        by_row.index_add_(0, batch.row_indices[start : start + chunk], losses.detach())
    if leaf.grad is not None:
        predicting.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return by_row


def measure_loss(
    hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], batch: MicroBatch, chunk: int = LOSS_CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """(each row's weighted loss sum [rows]; whether each label has the highest logit [labelled]), without gradients."""
    by_row = torch.zeros(len(batch.rows), dtype=torch.float32, device=hidden.device)
    hits = torch.zeros(batch.labelled, dtype=torch.bool, device=hidden.device)
    for start in range(0, batch.labelled, chunk):
        logits = head(hidden.index_select(0, batch.predictors[start : start + chunk])).float()
        by_row.index_add_(0, batch.row_indices[start : start + chunk], _weighted_losses(logits, batch, start))
        hits[start : start + chunk] = logits.argmax(-1) == batch.targets[start : start + chunk]
    return by_row, hits


def _weighted_losses(logits: torch.Tensor, batch: MicroBatch, start: int) -> torch.Tensor:
    """The losses of the labels from number `start` on, each times its weight: [chunk]. `logits`: [chunk, vocab]."""
    chunk = slice(start, start + len(logits))
    return cross_entropy(logits, batch.targets[chunk], reduction="none") * batch.loss_weights[chunk]
