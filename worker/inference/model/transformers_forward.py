"""transformers' own forward over our KV cache: for every architecture without a forward of our own."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from worker.inference.cache.forward_batch import BatchSegment, ForwardBatch
from worker.inference.cache.kv_cache import KVCache

Forward = Callable[[ForwardBatch, KVCache], torch.Tensor]
"""A model's forward: stores the new keys and values, returns float32 logits [num_logits, vocab]."""


class TransformersForward:
    """The model's own forward. An adapter is applied if PEFT has it switched on inside the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model

    def __call__(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """Segment by segment, so that rows of different lengths need no padding."""
        return torch.cat([self._logits(batch, segment, cache) for segment in batch.segments]).float()

    def _logits(self, batch: ForwardBatch, segment: BatchSegment, cache: KVCache) -> torch.Tensor:
        """Logits of each row's last tokens, [num_rows · num_logits, vocab]."""
        output = self._model(
            input_ids=batch.token_ids[segment.tokens].view(segment.num_rows, -1),
            position_ids=batch.positions[segment.tokens].view(segment.num_rows, -1),
            attention_mask=segment.mask,
            past_key_values=cache.as_transformers_cache(segment),
            use_cache=True,
            logits_to_keep=max(1, segment.num_logits),  # transformers takes 0 for all
        )
        logits: torch.Tensor = output.logits  # [num_rows, logits_to_keep, vocab]
        return logits[:, logits.shape[1] - segment.num_logits :].flatten(0, 1)
