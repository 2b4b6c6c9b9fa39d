"""`python -m benchmarks.gpu`: serving and training on this machine's GPU, at the sizes of a model with random weights.

    --sizes NAME     whose sizes (default: Llama-2-7B)
    --layers N       fewer layers than it has
    --place DIR      where the weights lie meanwhile (default: a temporary directory; a 7B's take 14 GB)

Serving: a decode step of the engine over an NF4 base, beside PEFT's `generate` in the same run. Training: an update of
the recipe, which gets no more memory than the plan says. Writes `benchmarks/results/gpu.json`.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from torch.profiler import ProfilerActivity, profile

from app.domain.architectures import PUBLISHED_ARCHITECTURES, Architecture
from app.domain.attempts import EncodedRow
from app.domain.memory import GPU16, PROCESS_BYTES, MicroBatchSize, estimate_memory
from app.domain.specs import TrainSpec
from benchmarks.machine import ROOT, head
from benchmarks.random_base import write_adapter, write_base
from worker.inference.cache.kv_cache import KVCache
from worker.inference.engine.offline import decode, prefill
from worker.inference.engine.scheduler import Scheduler
from worker.inference.ipc import EngineOutput, EngineSettings, Generate
from worker.inference.model.base import load_base
from worker.inference.model.llama_forward import LlamaForward
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.memory_use import base_bytes
from worker.inference.model.transformers_forward import Forward
from worker.inference.sampling_params import SamplingParams, ServedModel
from worker.precision import Precision, precision_here
from worker.training.batches import MicroBatch, collate
from worker.training.loss import backward_loss
from worker.training.master_weights import MasterWeights
from worker.training.model import load_trainable_model

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
RANK = 16
LENGTH = 200
STEPS = 16
STEPS_OF = ((1, 0), (1, 1), (8, 0), (8, 4), (16, 0), (16, 1), (16, 4), (16, 16), (32, 0), (32, 16))
"""Rows, and how many adapters are live among them."""
ADAPTERS = 16
PEFT_STEPS = 8
NF4 = {"bits": 4, "type": "nf4", "double": True}
BATCH = (4, 512)
UPDATES = 4
LABELLED = 0.33
SETTINGS = EngineSettings(memory_bytes=64 << 30, kv_bytes=16 << 30, prefix_cache_bytes=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=PUBLISHED_ARCHITECTURES, default="Llama-2-7B")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--place", type=Path)
    asked = parser.parse_args()
    sizes = PUBLISHED_ARCHITECTURES[asked.sizes]
    if asked.layers:
        sizes = sizes.model_copy(update={"layers": asked.layers})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = head("veritune on a GPU", "benchmarks.gpu") | {"device": _name(device), "layers": sizes.layers}
    with tempfile.TemporaryDirectory(prefix="veritune-gpu-", dir=asked.place) as name:
        directory = Path(name)
        base = write_base(sizes, directory / "base", device)
        adapters = [write_adapter(sizes, directory / f"a{number:02}", RANK, device) for number in range(ADAPTERS)]
        found["serving"] = serving(base, adapters, device)
        _write(found)
        found["peft"] = peft(base, adapters, device)
        _write(found)
        found["training"] = training(sizes, base, device)
        _write(found)


def serving(base: Path, adapters: Sequence[Path], device: torch.device) -> dict[str, Any]:
    """The engine's models: what loading takes, and a step by rows and live adapters; unrecorded beside it."""
    models = LoadedModels(SETTINGS)
    bare = _served(base)
    before, began = _allocated(device), time.perf_counter()
    loaded = models.load(bare, [])
    found: dict[str, Any] = {
        "dtype": str(models.dtype),
        "seconds": round(time.perf_counter() - began, 1),
        "planned": base_bytes(bare, device, models.dtype),
        "counted": models.memory.device,
        "allocated": _allocated(device) - before,
    }
    began = time.perf_counter()
    lent = [_served(base, path) for path in adapters]
    for adapter in lent:
        models.load(adapter, [bare])
    found["seconds_an_adapter"] = round((time.perf_counter() - began) / len(lent), 3)
    steps = [
        Decoding(
            models.forward,
            [bare if not live else lent[row % live] for row in range(rows)],
            loaded.kv_shape.num_layers,
            device,
        )
        for rows, live in STEPS_OF
    ]
    unrecorded = LlamaForward(loaded.model)
    steps += [
        Decoding(lambda _: unrecorded, [bare] * rows, loaded.kv_shape.num_layers, device, "unrecorded")
        for rows in (1, 16)
    ]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    found["steps"] = [step.timed() for step in steps]
    found["turns"] = [_turns(models, [lent[row % live] for row in range(16)]) for live in (1, 16)]
    found["taken_by_stores_and_recordings"] = free - torch.cuda.mem_get_info(device)[0] if free else 0
    for step, told in zip(steps, found["steps"], strict=True):  # last: launches stay slower once a profiler was there
        told["kernels_ms"] = step.kernels()
    return found


class Decoding:
    """Measure decode steps of rows with `LENGTH` tokens each."""

    def __init__(
        self,
        forward: Callable[[Sequence[ServedModel]], Forward],
        chosen: Sequence[ServedModel],
        layers: int,
        device: torch.device,
        way: str = "recorded",
    ) -> None:
        self._forward, self._chosen, self._device, self._way = forward, chosen, device, way
        self._store = KVCache(layers, device)
        self._store.reserve(len(chosen), LENGTH + 2 * STEPS)
        self._lengths = [LENGTH] * len(chosen)

    def timed(self) -> dict[str, Any]:
        """Milliseconds per step, and tokens per second."""
        for row in range(len(self._chosen)):
            prefill(self._forward([self._chosen[row]]), self._store, row, _prompt(row))
        taken = median([self._step() for _ in range(STEPS)][4:])
        told = {
            "rows": len(self._chosen),
            "live": len({model.digest for model in self._chosen if model.adapter_path}),
            "way": self._way,
            "ms": round(taken * 1e3, 2),
            "tokens_per_second": round(len(self._chosen) / taken, 1),
        }
        print(json.dumps(told), flush=True)
        return told

    def kernels(self) -> float | None:
        """Milliseconds of a step in which a kernel runs."""
        if self._device.type == "cpu":
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(4):
                self._step()
        microseconds: float = sum(event.self_device_time_total for event in seen.key_averages())
        return round(microseconds / 4e3, 2)

    def _step(self) -> float:
        began = time.perf_counter()
        forward = self._forward(self._chosen)
        decode(forward, self._store, [7] * len(self._chosen), self._lengths).argmax(-1).tolist()
        self._lengths = [length + 1 for length in self._lengths]
        return time.perf_counter() - began


def _turns(models: LoadedModels, chosen: Sequence[ServedModel]) -> dict[str, Any]:
    """The same with sampling, detokenization and output, as the scheduler's step does them."""
    said: list[EngineOutput] = []
    scheduler = Scheduler(models, SETTINGS, said.append)
    sampling = SamplingParams(max_tokens=4 * STEPS, temperature=0, ignore_eos=True)
    for row, model in enumerate(chosen):
        scheduler.add(Generate(id=str(row), model=model, prompt=_prompt(row), sampling=sampling))
    while scheduler.stats.prefills < len(chosen) or scheduler.stats.generation_tokens == 0:
        scheduler.step()
    before, began = scheduler.stats.generation_tokens, time.perf_counter()
    while scheduler.stats.running == len(chosen):
        scheduler.step()
    seconds = time.perf_counter() - began
    pace = (scheduler.stats.generation_tokens - before) / seconds
    return {"rows": len(chosen), "live": len({model.digest for model in chosen}), "tokens_per_second": round(pace, 1)}


def peft(base: Path, adapters: Sequence[Path], device: torch.device) -> list[dict[str, Any]]:
    """PEFT's `generate` over the same base, with `adapter_names` to mix adapters."""
    dtype = precision_here(device, "unknown").compute
    bare = load_base(_served(base), device, dtype).model
    model: Any = PeftModel.from_pretrained(bare, adapters[0], adapters[0].name, autocast_adapter_dtype=False)
    for path in adapters[1:]:
        model.load_adapter(path, path.name, autocast_adapter_dtype=False)
    model.to(dtype).eval()
    found = []
    for rows, live in ((1, 0), (1, 1), (16, 0), (16, 1), (16, 16)):
        names = [adapters[row % live].name for row in range(rows)] if live else None
        ids = torch.tensor([_prompt(row) for row in range(rows)], device=device)
        seconds = _generated(model, ids, names)
        found.append({"rows": rows, "live": live, "tokens_per_second": round(rows * PEFT_STEPS / seconds, 1)})
        print("peft", json.dumps(found[-1]), flush=True)
    return found


@torch.inference_mode()
def _generated(model: Any, ids: torch.Tensor, names: list[str] | None) -> float:
    """Seconds of `PEFT_STEPS` decode steps, without the prefill."""

    def timed(count: int) -> float:
        began = time.perf_counter()
        chosen = {} if names is None else {"adapter_names": names}
        told = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **told, **chosen).tolist()
        return time.perf_counter() - began

    def both() -> float:
        timed(2)
        return min(timed(PEFT_STEPS + 1) for _ in range(2)) - min(timed(1) for _ in range(2))

    if names is not None:
        return both()
    with model.disable_adapter():
        return both()


def training(sizes: Architecture, base: Path, device: torch.device) -> list[dict[str, Any]]:
    """Updates of the training recipe: tokens per second, and peak bytes next to the plan's."""
    found = []
    for recompute in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        asked = {
            "dataset": "d",
            "adapter": {"type": "lora", "r": RANK},
            "trainer": {"enable_gradient_checkpointing": recompute},
        }
        spec = TrainSpec.model_validate(asked)
        found.append({"recompute": recompute, **_updates(sizes, base, spec, device)})
        print("training", json.dumps(found[-1]), flush=True)
    return found


def _updates(sizes: Architecture, base: Path, spec: TrainSpec, device: torch.device) -> dict[str, Any]:
    precision: Precision = precision_here(device, "unknown")
    before = _allocated(device)
    load = MicroBatchSize(BATCH[0] * BATCH[1], BATCH[1], _batch().labelled)
    recompute = spec.trainer.enable_gradient_checkpointing is True
    planned = (
        estimate_memory(sizes, spec, load, GPU16, recompute=recompute, stored=1 << 40).total - PROCESS_BYTES["gpu"]
    )
    trainable = load_trainable_model(base, spec, UPDATES, precision, device, lambda _: None)
    masters = MasterWeights(trainable.method.parameters(), precision.compute)
    optimizer = torch.optim.AdamW([masters.flat], lr=1e-5)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.set_per_process_memory_fraction(planned / torch.cuda.mem_get_info(device)[1])
    batch, seconds = _batch().to(device), []
    for _ in range(UPDATES):
        began = time.perf_counter()
        backward_loss(trainable.hidden(batch), trainable.head, batch, 1.0)
        masters.collect()
        optimizer.step()
        masters.reset()
        _snapshot = masters.by_name()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return {
        "precision": precision.name,
        "forward": type(trainable.hidden).__name__,
        "tokens_per_second": round(batch.tokens / median(seconds[1:])),
        "allowed_as_planned_without_context": planned,
        "peak": _peak(device) - before,
        "reserved": torch.cuda.max_memory_reserved(device) - before if device.type == "cuda" else 0,
    }


def _batch() -> MicroBatch:
    rows, length = BATCH
    spans = ((length - round(LABELLED * length), length),)
    return collate([EncodedRow(line=line, ids=tuple(_prompt(line, length)), trained=spans) for line in range(rows)])


def _prompt(row: int, length: int = LENGTH) -> list[int]:
    return [100 + (31 * row + 7 * place) % 9_000 for place in range(length)]


def _served(base: Path, adapter: Path | None = None) -> ServedModel:
    return ServedModel(
        digest=adapter.name if adapter else "base",
        base_digest="base",
        base_path=str(base),
        quantization=NF4,
        adapter_path=str(adapter) if adapter else None,
        max_model_len=2_048,
    )


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _write(found: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
