"""Runs one step of a batch: builds the forward's input, calls the model over the batch's KV cache, returns logits."""

from collections.abc import Sequence
from itertools import accumulate

import torch

from worker.inference.cache.forward_batch import ForwardBatch, PrefillChunk, decode_segment, prefill_segment
from worker.inference.cache.kv_cache import KVCache
from worker.inference.engine.batch import Batch
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.transformers_forward import Forward


class ModelRunner:
    """Drives the loaded models."""

    def __init__(self, models: LoadedModels) -> None:
        self._models = models

    def execute(self, batch: Batch, chunks: Sequence[PrefillChunk]) -> torch.Tensor:
        """Compute the next token of each decoding sequence, and these chunks of the prefilling ones.

        Returns logits [num_decoding + chunks' num_logits, vocab], float32.
        """
        assert batch.kv_cache is not None
        computed = batch.running[: len(batch.decoding) + len(chunks)]
        forward = self._models.forward([sequence.model for sequence in computed], deterministic=batch.deterministic)
        last_tokens = [sequence.token_ids[-1] for sequence in batch.decoding]
        lengths = [sequence.num_computed_tokens for sequence in batch.decoding]
        return run_step(forward, batch.kv_cache, last_tokens, lengths, chunks)


def last_position_logits(logits: torch.Tensor, logits_per_row: list[int]) -> torch.Tensor:
    """Last-position logits of each of the first rows, [num_rows, vocab], copied to the CPU once."""
    if max(logits_per_row, default=1) == 1:
        return logits[: len(logits_per_row)].cpu()
    return logits[[end - 1 for end in accumulate(logits_per_row)]].cpu()


@torch.inference_mode()
def run_step(
    forward: Forward, cache: KVCache, token_ids: Sequence[int], lengths: Sequence[int], chunks: Sequence[PrefillChunk]
) -> torch.Tensor:
    """Append a token to each of the first rows, which hold `lengths` positions, and compute prefill chunks in others.

    Returns logits [len(token_ids) + chunks' num_logits, vocab]. Chunks are not padded.
    """
    ends = [chunk.start + len(chunk.token_ids) for chunk in chunks]
    cache.ensure_positions(max([*(length + 1 for length in lengths), *ends]))
    return forward(_build_forward_batch(cache, token_ids, lengths, chunks), cache)


def _build_forward_batch(
    cache: KVCache, token_ids: Sequence[int], lengths: Sequence[int], chunks: Sequence[PrefillChunk]
) -> ForwardBatch:
    def tensor(numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=cache.device, dtype=torch.long)

    positions = tensor(lengths)
    segments = [decode_segment(positions, cache.num_visible(max(lengths) + 1))] if token_ids else []
    all_ids, all_positions, logits_indices = [*token_ids], [*lengths], [*range(len(token_ids))]
    for chunk in chunks:
        end = chunk.start + len(chunk.token_ids)
        segments.append(prefill_segment(chunk, len(all_ids), cache.num_visible(end), cache.device))
        all_ids += chunk.token_ids
        all_positions += range(chunk.start, end)
        logits_indices += range(len(all_ids) - chunk.num_logits, len(all_ids))
    return ForwardBatch(
        token_ids=tensor(all_ids),
        positions=tensor(all_positions),
        segments=segments,
        tokens_per_row=tensor([1] * len(token_ids) + [len(chunk.token_ids) for chunk in chunks]),
        logits_indices=tensor(logits_indices),
    )
