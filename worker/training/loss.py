"""Cross-entropy at labelled positions only, in chunks and by row, with its backward pass. It knows no optimizer.

Two thirds of a ReAct trajectory are Observations without a loss: their logits are never computed. A chunk's
logits are gone before the next chunk's begin, so the vocabulary's width is paid for one chunk at a time.
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
    """Backpropagate `weight` × the summed loss through `head` and `hidden`; return each row's sum, unweighted: [rows].

    `hidden`: [tokens, width], with a graph behind it. With weight = 1 / (labelled tokens of the update), gradients
    added up over micro-batches equal those of one big batch.
    """
    by_row = torch.zeros(len(batch.rows), dtype=torch.float32, device=hidden.device)
    # The graph is cut at the chosen positions: each chunk leaves its gradient here and frees its logits.
    chosen = hidden.index_select(0, batch.predictors)
    leaf = chosen.detach().requires_grad_()
    for start in range(0, batch.labelled, chunk):
        logits = head(leaf[start : start + chunk])
        losses = cross_entropy(logits.float(), batch.targets[start : start + chunk], reduction="none")
        (losses.sum() * weight).backward()  # type: ignore[no-untyped-call]
        by_row.index_add_(0, batch.row_indices[start : start + chunk], losses.detach())
    if leaf.grad is not None:
        chosen.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return by_row


def measure_loss(
    hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], batch: MicroBatch, chunk: int = LOSS_CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """(each row's summed loss [rows]; how many labelled tokens have the highest logit), without any gradient."""
    by_row = torch.zeros(len(batch.rows), dtype=torch.float32, device=hidden.device)
    hits = torch.zeros((), dtype=torch.long, device=hidden.device)
    for start in range(0, batch.labelled, chunk):
        targets = batch.targets[start : start + chunk]
        logits = head(hidden.index_select(0, batch.predictors[start : start + chunk])).float()
        by_row.index_add_(0, batch.row_indices[start : start + chunk], cross_entropy(logits, targets, reduction="none"))
        hits += (logits.argmax(-1) == targets).sum()
    return by_row, hits
