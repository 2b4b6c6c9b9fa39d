"""Moves prefixes between a batch's KV cache and the prefix cache."""

from worker.inference.cache.prefix_cache import PrefixCache
from worker.inference.engine.batch import Batch
from worker.inference.engine.sequence import Sequence


def restore_prefix(prefixes: PrefixCache, batch: Batch, sequence: Sequence) -> None:
    """Restore what the prefix cache has of a prompt into the batch's next row."""
    assert batch.kv_cache is not None
    match = None if sequence.skips_prefix_cache else prefixes.match(sequence.prefix_key, sequence.prompt_ids)
    if match:
        num_cached = min(match.length, len(sequence.prompt_ids) - 1)  # the last token is computed, for its logits
        batch.kv_cache.restore(len(batch.running), match.snapshot, num_cached)
        sequence.num_cached_tokens = sequence.num_computed_tokens = num_cached


def store_prefix(prefixes: PrefixCache, batch: Batch, row: int) -> None:
    """Store a decoding row in the prefix cache, if that may help a later prompt."""
    sequence = batch.decoding[row]
    if sequence.sampling.deterministic or batch.kv_cache is None:
        return
    computed = sequence.token_ids[: sequence.num_computed_tokens]
    if prefixes.worth_storing(sequence.prefix_key, computed):
        prefixes.store(sequence.prefix_key, computed, batch.kv_cache.snapshot(row, len(computed)))
