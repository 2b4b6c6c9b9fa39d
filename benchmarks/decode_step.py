"""`python -m benchmarks.decode_step`: profiles a decode step of 16 rows, in transformers' forward and in ours.

    --base DIR     a base as plain weights (default: what `benchmarks.inference` exported)
    --adapters DIR its adapters, for the mixed step

Prints milliseconds a step by kind of work, and writes them to `benchmarks/results/decode_step.json`; the rest is Python
and dispatch between kernels.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import ROOT, head
from benchmarks.publishing import KEPT
from worker.inference.cache.kv_cache import KVCache
from worker.inference.engine.offline import decode, prefill
from worker.inference.ipc import EngineSettings
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.transformers_forward import Forward, TransformersForward
from worker.inference.sampling_params import ServedModel

RESULTS = ROOT / "benchmarks" / "results" / "decode_step.json"
ROWS = 16
LENGTH = 200
STEPS = 30
KINDS = {
    "matrix products": ("linear", "mm", "addmm", "_linear_pointwise", "matmul"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention", "bmm", "_softmax"),
    "copies": ("copy_", "cat", "index_put_", "_index_put_impl_", "clone", "contiguous", "_to_copy", "repeat", "stack"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, default=next(iter((KEPT / "bases").glob("*")), None))
    parser.add_argument("--adapters", type=Path, default=KEPT / "adapters")
    given = parser.parse_args()
    models = LoadedModels(EngineSettings())
    base = served(given.base)
    adapters = [served(given.base, path) for path in sorted(given.adapters.iterdir())[:ROWS]]
    loaded = models.load(base, [])
    for adapter in adapters:
        models.load(adapter, [base])
    stock = TransformersForward(loaded.model)
    ways: dict[str, Callable[[], Forward]] = {
        "transformers, base": lambda: stock,
        "ours, base": lambda: models.forward([base] * ROWS),
    }
    for live in (4, 16):
        ways[f"ours, {live} adapters"] = partial(models.forward, [adapters[row % live] for row in range(ROWS)])
    figures = {}
    for name, way in ways.items():
        figures[name] = measured(way, stock, loaded.kv_shape.num_layers)
        print(name, json.dumps(figures[name]))
    result = head("veritune decode step", "benchmarks.decode_step") | {"milliseconds": figures}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def served(base: Path, adapter: Path | None = None) -> ServedModel:
    """A base model, or an adapter over it."""
    return ServedModel(
        digest=adapter.name if adapter else base.name,
        base_digest=base.name,
        base_path=str(base),
        adapter_path=str(adapter) if adapter else None,
        max_model_len=2_048,
    )


def measured(way: Callable[[], Forward], reader: Forward, layers: int) -> dict[str, float]:
    """Milliseconds of a step whose prompts `reader` has read: as it takes without a profiler, and by kind of kernel."""
    store = KVCache(layers)
    store.reserve(ROWS, LENGTH + 3 * STEPS)
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(500, 40_000, (ROWS, LENGTH), generator=draw).tolist()
    lengths = [LENGTH] * ROWS
    for row, prompt in enumerate(ids):
        prefill(reader, store, row, prompt)

    def step() -> float:
        began = time.perf_counter()
        decode(way(), store, [7] * ROWS, lengths)
        lengths[:] = [length + 1 for length in lengths]
        return time.perf_counter() - began

    whole = median([step() for _ in range(STEPS)][5:]) * 1e3
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            step()
    kinds: Counter[str] = Counter()
    for event in found.key_averages():
        kinds[_kind(event.key)] += event.self_cpu_time_total / STEPS / 1e3
    figures = {"step": whole, **kinds, "between kernels": max(0.0, whole - sum(kinds.values()))}
    return {name: round(value, 2) for name, value in figures.items()}


def _kind(name: str) -> str:
    short = name.rpartition("::")[2]
    return next((kind for kind, names in KINDS.items() if short in names), "element-wise and the rest")


if __name__ == "__main__":
    main()
