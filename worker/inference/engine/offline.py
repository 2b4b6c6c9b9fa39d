"""A model over a KV cache without a scheduler: for benchmarks and tests."""

import torch

from worker.inference.cache.forward_batch import PrefillChunk
from worker.inference.cache.kv_cache import KVCache
from worker.inference.engine.model_runner import run_step
from worker.inference.engine.scheduler import PREFILL_CHUNK_TOKENS
from worker.inference.model.transformers_forward import Forward


def prefill(forward: Forward, cache: KVCache, row: int, token_ids: list[int], start: int = 0) -> torch.Tensor:
    """Compute `token_ids[start:]` in one row, which holds the positions before; return the last logits [vocab]."""
    logits = torch.empty(0)
    for begin in range(start, len(token_ids), PREFILL_CHUNK_TOKENS):
        end = min(begin + PREFILL_CHUNK_TOKENS, len(token_ids))
        chunk = PrefillChunk(row, token_ids[begin:end], begin, int(end == len(token_ids)))
        logits = run_step(forward, cache, (), (), [chunk])
    return logits[0]


def decode(forward: Forward, cache: KVCache, token_ids: list[int], lengths: list[int]) -> torch.Tensor:
    """Append a token to each of the first rows, which hold `lengths` positions; return logits [num_rows, vocab]."""
    return run_step(forward, cache, token_ids, lengths, ())
