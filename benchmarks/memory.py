"""`python -m benchmarks.memory`: compares the memory model with measurements and with published figures.

Two ways: resident memory of fresh processes that train SmolLM2-135M on this CPU, and the recipe's update at the sizes
of models that do not fit here, on the meta device.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from peft import LoraConfig

from app.domain.architectures import PUBLISHED_ARCHITECTURES
from app.domain.attempts import EncodedRow
from app.domain.memory import GPU16, PROCESS_BYTES, Machine, MicroBatchSize, estimate_memory
from app.domain.specs import TrainSpec
from benchmarks.encoded import base_in
from benchmarks.machine import ROOT, head
from worker.environment import for_tensors
from worker.processor import cpu_here
from worker.training.batches import MicroBatch, collate
from worker.training.memory import peak_resident_bytes, return_free_memory

RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
CACHE = Path(os.environ.get("VERITUNE_CACHE", ROOT / ".cache" / "veritune"))
SMALL = PUBLISHED_ARCHITECTURES["SmolLM2-135M"]
GRID: tuple[dict[str, Any], ...] = tuple(
    {"rows": rows, "length": length, "rank": rank, "recompute": recompute}
    for rows, length, rank, recompute in (
        (1, 256, 8, False),
        (4, 256, 8, False),
        (8, 256, 8, False),
        (2, 1024, 8, False),
        (4, 256, 64, False),
        (4, 256, 8, True),
        (8, 256, 8, True),
        (2, 1024, 8, True),
        (4, 256, 64, True),
    )
)
UPDATES = 16
LABELLED = 0.33
SHORTEST = 0.4
"""Of the longest row: rows differ, as those of a dataset do, and so does what the C library makes of its heap."""


def spec_of(rank: int, *, recompute: bool) -> TrainSpec:
    asked = {
        "dataset": "d",
        "adapter": {"type": "lora", "r": rank},
        "trainer": {"enable_gradient_checkpointing": recompute},
    }
    return TrainSpec.model_validate(asked)


def train_here(base: Path, rows: int, length: int, rank: int, *, recompute: bool) -> dict[str, int]:
    """In a fresh process: bytes resident before the model is loaded, when it is, and at the peak of some updates."""
    import torch

    from worker.precision import precision_here
    from worker.training.loss import backward_loss
    from worker.training.master_weights import MasterWeights
    from worker.training.model import load_trainable_model

    process, device = psutil.Process(), torch.device("cpu")
    precision = precision_here(device, "unknown")
    before = process.memory_info().rss
    trainable = load_trainable_model(base, spec_of(rank, recompute=recompute), 1, precision, device, lambda _: None)
    return_free_memory()
    masters = MasterWeights(trainable.method.parameters(), precision.compute)
    optimizer = torch.optim.AdamW([masters.flat], lr=1e-4)
    loaded = process.memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of loading
    labelled = 0
    for update in range(UPDATES):
        batch = mixed_rows(rows, length, update)
        labelled = max(labelled, batch.labelled)
        hidden = trainable.hidden(batch)
        backward_loss(hidden, trainable.head, batch, 1.0)
        masters.collect()
        optimizer.step()
        masters.reset()
        masters.by_name()
    return {"before": before, "loaded": loaded, "peak": peak_resident_bytes(), "labelled": labelled}


def mixed_rows(rows: int, length: int, seed: int) -> MicroBatch:
    """As many rows as `rows` of `length` tokens have room for: one that long, the others of any length."""
    draw, left, found = random.Random(seed), rows * length, list[int]()
    while left >= SHORTEST * length:
        found.append(min(left, draw.randint(int(SHORTEST * length), length) if found else length))
        left -= found[-1]
    return collate(
        [
            EncodedRow(line=1, ids=(5,) * size, trained=((size - max(1, round(LABELLED * size)), size),))
            for size in found
        ]
    )


def measured(base: Path, stored: int, **setting: Any) -> dict[str, Any]:
    """One setting: the planned bytes, and the measured peak of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", str(base), json.dumps(setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=for_tensors())
    seen = json.loads(done.stdout.splitlines()[-1])
    tokens = setting["rows"] * setting["length"]
    here = Machine("cpu", 2 if cpu_here().fast_bf16 else 4)
    spec = spec_of(setting["rank"], recompute=setting["recompute"])
    load = MicroBatchSize(tokens, setting["length"], seen["labelled"], UPDATES)
    planned = estimate_memory(SMALL, spec, load, here, recompute=setting["recompute"], stored=stored)
    return {**setting, **seen, "planned": planned.model_dump(), "ratio": round(planned.total / seen["peak"], 3)}


def shapes(name: str, tokens: int, length: int, *, recompute: bool, packed: bool, stock: bool) -> dict[str, Any]:
    """The same on the meta device, from a model's sizes, without a process's own bytes."""
    from benchmarks.shape_only import rows_of, run_update

    began = time.perf_counter()
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    batch = rows_of(tokens, length, LABELLED)
    seen = run_update(PUBLISHED_ARCHITECTURES[name], config, batch, recompute=recompute, packed=packed, stock=stock)
    found = {
        "model": name,
        "tokens": tokens,
        "length": length,
        "recompute": recompute,
        "packed": packed,
        "stock": stock,
        "kept_bytes_a_token": round(seen.kept / tokens),
        "weights": seen.weights,
        "peak": seen.peak,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if stock:
        return found
    spec = TrainSpec.model_validate({"dataset": "d", "quantization": {"bits": 4} if packed else None})
    planned = estimate_memory(
        PUBLISHED_ARCHITECTURES[name],
        spec,
        MicroBatchSize(tokens, length, batch.labelled),
        GPU16,
        recompute=recompute,
        stored=1 << 40,
    )
    return found | {"planned": planned.total, "ratio": round((planned.total - PROCESS_BYTES["gpu"]) / seen.peak, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, metavar=("BASE", "SETTING"), help="train in this process and print bytes")
    parser.add_argument("--base", type=Path, help="where SmolLM2-135M is, if not in the cache")
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(train_here(Path(asked.child[0]), **json.loads(asked.child[1]))))
        return
    base = asked.base or CACHE / "models" / base_in(CACHE).digest
    stored = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    found = head("veritune memory benchmark", "benchmarks.memory") | {"cpu": [], "shapes": []}
    for setting in GRID:
        found["cpu"].append(measured(base, stored, **setting))
        print(json.dumps(found["cpu"][-1]), flush=True)
    for name in PUBLISHED_ARCHITECTURES:
        for recompute in (False, True):
            found["shapes"].append(shapes(name, 2048, 512, recompute=recompute, packed=True, stock=False))
            print(json.dumps(found["shapes"][-1]), flush=True)
    for recompute in (False, True):
        found["shapes"].append(shapes("Llama-2-7B", 2048, 512, recompute=recompute, packed=True, stock=True))
        print(json.dumps(found["shapes"][-1]), flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
