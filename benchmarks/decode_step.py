"""`python -m benchmarks.decode_step`: profiles a decode step of 16 rows, in transformers' forward and in ours.

    --base DIR     a base as plain weights (default: what `benchmarks.inference` exported)
    --adapters DIR its adapters, for the mixed step

Prints milliseconds a step by kind of work, and writes them to `benchmarks/results/decode_step.json`; the rest is Python
and dispatch between kernels. All run in turns, in the engine's environment. `times_transformers` is the median, over
the rounds, of how many of our steps one step of transformers' forward takes.
"""

import argparse
import json
import os
import sys
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
from worker.environment import TENSORS, for_tensors
from worker.inference.cache.kv_cache import KVCache
from worker.inference.engine.offline import decode, prefill
from worker.inference.ipc import EngineSettings
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.transformers_forward import Forward, TransformersForward
from worker.inference.sampling_params import ServedModel

RESULTS = ROOT / "benchmarks" / "results" / "decode_step.json"
ROWS = 16
LENGTH = 200
ROUNDS = 11
STEPS, WARM_UP_STEPS = 10, 3
PROFILED_STEPS = 30
STOCK = "transformers, base"
KINDS = {
    "matrix products": ("linear", "mm", "addmm", "_linear_pointwise", "matmul"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention", "bmm", "_softmax"),
    "copies": ("copy_", "cat", "index_put_", "_index_put_impl_", "clone", "contiguous", "_to_copy", "repeat", "stack"),
}


def main() -> None:
    if not TENSORS.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.decode_step", *sys.argv[1:]], for_tensors())
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
    ways: dict[str, Callable[[], Forward]] = {STOCK: lambda: stock, "ours, base": lambda: models.forward([base] * ROWS)}
    for live in (4, 16):
        ways[f"ours, {live} adapters"] = partial(models.forward, [adapters[row % live] for row in range(ROWS)])
    decoders = {name: Decoder(way, stock, loaded.kv_shape.num_layers) for name, way in ways.items()}
    rounds = [{name: decoder.milliseconds() for name, decoder in decoders.items()} for _ in range(ROUNDS)]
    figures = {name: decoder.by_kind(median(taken[name] for taken in rounds)) for name, decoder in decoders.items()}
    for name, figure in figures.items():
        figure["times_transformers"] = round(median(taken[STOCK] / taken[name] for taken in rounds), 3)
        figure["fastest"] = round(min(taken[name] for taken in rounds), 2)
        print(name, json.dumps(figure))
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


class Decoder:
    """16 rows whose prompts `prefiller` has computed, decoded by another forward."""

    def __init__(self, way: Callable[[], Forward], prefiller: Forward, num_layers: int) -> None:
        self._way, self._cache = way, KVCache(num_layers)
        self._cache.reserve(ROWS, LENGTH + PROFILED_STEPS)
        draw = torch.Generator().manual_seed(3)
        for row, prompt in enumerate(torch.randint(500, 40_000, (ROWS, LENGTH), generator=draw).tolist()):
            prefill(prefiller, self._cache, row, prompt)

    def milliseconds(self) -> float:
        """The median step behind the prompts, after a warm-up."""
        return median([self._step(LENGTH + number) for number in range(STEPS)][WARM_UP_STEPS:]) * 1e3

    def by_kind(self, whole: float) -> dict[str, float]:
        """Milliseconds of a step that takes `whole` without a profiler, by kind of kernel."""
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for number in range(PROFILED_STEPS):
                self._step(LENGTH + number)
        kinds: Counter[str] = Counter()
        for event in found.key_averages():
            kinds[_kind(event.key)] += event.self_cpu_time_total / PROFILED_STEPS / 1e3
        figures = {"step": whole, **kinds, "between kernels": max(0.0, whole - sum(kinds.values()))}
        return {name: round(value, 2) for name, value in figures.items()}

    def _step(self, length: int) -> float:
        began = time.perf_counter()
        decode(self._way(), self._cache, [7] * ROWS, [length] * ROWS)
        return time.perf_counter() - began


def _kind(name: str) -> str:
    short = name.rpartition("::")[2]
    return next((kind for kind, names in KINDS.items() if short in names), "element-wise and the rest")


if __name__ == "__main__":
    main()
