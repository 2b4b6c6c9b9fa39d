"""Cross-entropy at labelled positions only, in chunks, with its backward pass. It knows no optimizer.

Two thirds of a ReAct trajectory are Observations without a loss: their logits are never computed. A chunk's
logits are gone before the next chunk's begin, so the vocabulary's width is paid for one chunk at a time.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

CHUNK = 512
"""Labelled positions whose logits exist at once: 100 MB in float32 over a vocabulary of 49,152."""


def backward_loss(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    predictors: torch.Tensor,
    targets: torch.Tensor,
    weight: float | torch.Tensor,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Backpropagate `weight` × the summed loss through `head` and `hidden`; return the sum, unweighted.

    `hidden`: [tokens, width], with a graph behind it. `predictors`: indices of tokens; `targets`: the token that
    each should predict. With weight = 1 / (labelled tokens of the
    update), gradients added up over micro-batches equal those of one big batch.
    """
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    # The graph is cut at the chosen positions: each chunk leaves its gradient here and frees its logits.
    chosen = hidden.index_select(0, predictors)
    leaf = chosen.detach().requires_grad_()
    for start in range(0, targets.numel(), chunk):
        logits = head(leaf[start : start + chunk])
        summed = cross_entropy(logits.float(), targets[start : start + chunk], reduction="sum")
        (summed * weight).backward()  # type: ignore[no-untyped-call]
        total += summed.detach()
    if leaf.grad is not None:
        chosen.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return total
