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
    verdict_weight: float = 1.0,
) -> torch.Tensor:
    """Backpropagate `weight` × the summed loss through `head` and `hidden`; return each row's sum, unweighted: [rows].

    `hidden`: [num_tokens, hidden_size], part of an autograd graph. With weight = 1 / (labelled tokens of the update),
    gradients added up over micro-batches equal those of one big batch. `verdict_weight` is a factor on the losses of
    verdicts.
    """
    by_row = torch.zeros(len(batch.rows), dtype=torch.float32, device=hidden.device)
    weights = None if verdict_weight == 1 else batch.loss_weights(verdict_weight)
    # The graph is cut at the predicting positions: each chunk adds its gradient to `leaf` and frees its logits.
    predicting = hidden.index_select(0, batch.predictors)  # [labelled, hidden_size]
    leaf = predicting.detach().requires_grad_()
    for start in range(0, batch.labelled, chunk):
        logits = head(leaf[start : start + chunk])
        losses = cross_entropy(logits.float(), batch.targets[start : start + chunk], reduction="none")
        weighted = losses if weights is None else losses * weights[start : start + chunk]
        (weighted.sum() * weight).backward()  # type: ignore[no-untyped-call]
        by_row.index_add_(0, batch.row_indices[start : start + chunk], losses.detach())
    if leaf.grad is not None:
        predicting.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return by_row


def measure_loss(
    hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], batch: MicroBatch, chunk: int = LOSS_CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """(each row's summed loss [rows]; whether each label has the highest logit [labelled]), without any gradient."""
    by_row = torch.zeros(len(batch.rows), dtype=torch.float32, device=hidden.device)
    hits = torch.zeros(batch.labelled, dtype=torch.bool, device=hidden.device)
    for start in range(0, batch.labelled, chunk):
        targets = batch.targets[start : start + chunk]
        logits = head(hidden.index_select(0, batch.predictors[start : start + chunk])).float()
        by_row.index_add_(0, batch.row_indices[start : start + chunk], cross_entropy(logits, targets, reduction="none"))
        hits[start : start + chunk] = logits.argmax(-1) == targets
    return by_row, hits
