"""`python -m benchmarks.tuning_methods`: every method of a spec, trained on the real small model and served.

    --updates N --rows N    updates, and rows an update
    --only NAME …           some of them

One line each: the loss on rows that were held out before and after, and how far the engine's logits behind 20 prompts
are from the training process's own. In float32, where rounding hides nothing. Writes
`benchmarks/results/tuning_methods.json`.
"""

import argparse
import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from app.domain.attempts import EncodedRow, TrainOrder
from app.domain.specs import TrainSpec
from app.domain.tuning_methods import servable_by, shares_its_base
from benchmarks.encoded import Scale, Work, prepare
from benchmarks.machine import ROOT, head
from worker.inference.cache.kv_cache import KVCache
from worker.inference.engine.offline import prefill
from worker.inference.ipc import EngineSettings
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.sampling_params import ServedModel
from worker.precision import FP32
from worker.training import model, recipe
from worker.training.batches import collate
from worker.training.channel import Channel
from worker.training.evaluation import HeldOut
from worker.training.model import TrainableModel

RESULTS = ROOT / "benchmarks" / "results" / "tuning_methods.json"
PROMPTS = 20
HELD_OUT = 40
CPU = torch.device("cpu")

NF4, FP4, INT8 = {"bits": 4}, {"bits": 4, "quant_type": "fp4"}, {"bits": 8}
LORA: dict[str, Any] = {"type": "lora", "r": 8}
APPROACHES: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None, float]] = {
    "full": (None, None, 1e-4),
    "lora": (LORA, None, 1e-3),
    "rslora": (LORA | {"use_rslora": True}, NF4, 1e-3),
    "dora": (LORA | {"use_dora": True}, NF4, 1e-3),
    "pissa": (LORA | {"init_lora_weights": "pissa"}, None, 5e-4),
    "olora": (LORA | {"init_lora_weights": "olora"}, None, 5e-4),
    "adalora": ({"type": "adalora", "init_r": 12, "target_r": 4}, NF4, 1e-2),
    "ia3": ({"type": "ia3"}, None, 2e-2),
    "adaption_prompt": ({"type": "adaption_prompt"}, NF4, 3e-2),
    "int8": (LORA, INT8, 1e-3),
    "nf4": (LORA, NF4, 1e-3),
    "fp4": (LORA, FP4, 1e-3),
}
"""Name → (adapter, quantisation, learning rate)."""


def measure(name: str, work: Work, directory: Path) -> dict[str, Any]:
    adapter, quantization, rate = APPROACHES[name]
    trainer = work.spec.trainer.model_dump() | {"learning_rate": rate}
    changes = {"adapter": adapter, "quantization": quantization, "trainer": trainer}
    spec = TrainSpec.model_validate(work.spec.model_dump(mode="json") | changes)
    directory.mkdir()
    order = work.order(directory).model_copy(update={"spec": spec})
    held = work.every[work.schedule.rows :][:HELD_OUT]
    began = time.perf_counter()
    trainable, before, events = _train(order, held)
    after = _loss(trainable, held, order)
    prompts = [list(row.ids[: row.trained[0][0]]) for row in held[:PROMPTS]]
    ranks: dict[str, int] = next((event["data"] for event in events if event.get("message") == "remaining ranks"), {})
    return {
        "updates": order.schedule.updates,
        "held_out_loss": [round(before, 4), round(after, 4)],
        "fell_by": round(1 - after / before, 4),
        "largest_difference_of_a_logit": _difference(trainable, order, prompts),
        "served_by": servable_by(spec.adapter),
        "published_bytes": sum(path.stat().st_size for path in (directory / "adapter").iterdir()),
        "ranks": sorted(set(ranks.values())),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _train(order: TrainOrder, held: list[EncodedRow]) -> tuple[TrainableModel, float, list[dict[str, Any]]]:
    seen: list[tuple[TrainableModel, float]] = []

    def load(*given: Any) -> TrainableModel:
        trainable = model.load_trainable_model(*given)
        seen.append((trainable, _loss(trainable, held, order)))
        return trainable

    untyped: Any = recipe
    untyped.load_trainable_model, untyped.precision_here = load, lambda *_: FP32
    out = io.BytesIO()
    recipe.train(order, Channel(out, io.BytesIO()))
    return *seen[0], [json.loads(line) for line in out.getvalue().splitlines()]


def _loss(trainable: TrainableModel, held: list[EncodedRow], order: TrainOrder) -> float:
    found = HeldOut(held, None, order.schedule.max_tokens).evaluate(trainable, CPU)
    assert found is not None
    return found.loss


def _difference(trainable: TrainableModel, order: TrainOrder, prompts: list[list[int]]) -> float:
    models = LoadedModels(EngineSettings(device="cpu", dtype="float32"))
    base = models.load(served(order), [])
    trainable.method.module.eval()
    worst = 0.0
    for prompt in prompts:
        store = KVCache(base.kv_shape.num_layers)
        store.reserve(1, len(prompt))
        theirs = prefill(models.forward([served(order)]), store, 0, prompt)
        with torch.no_grad():
            batch = collate([EncodedRow(line=1, ids=tuple(prompt), trained=())])
            mine = trainable.head(trainable.hidden(batch)[-1:])[0]
        worst = max(worst, float((theirs - mine).abs().max()))
    return round(worst, 6)


def served(order: TrainOrder) -> ServedModel:
    """What `order` has published, as the engine is asked for it."""
    directory, held = str(order.directory / "adapter"), order.spec.quantization
    full = order.spec.adapter is None
    return ServedModel(
        digest="adapter",
        base_digest="base" if shares_its_base(order.spec.adapter) else "its own",
        base_path=directory if full else str(order.base.path),
        quantization=held and {"bits": held.bits, "type": held.quant_type, "double": held.double_quant},
        adapter_path=None if full else directory,
        max_model_len=2_048,
    )


def main() -> None:
    given = argparse.ArgumentParser()
    given.add_argument("--updates", type=int, default=30)
    given.add_argument("--rows", type=int, default=2)
    given.add_argument("--only", nargs="*", default=list(APPROACHES), choices=list(APPROACHES))
    asked = given.parse_args()
    cache = Path(os.environ.get("VERITUNE_CACHE", ROOT / ".cache" / "veritune"))
    lines: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="veritune-tuning methods-") as temporary:
        scale = Scale(updates=asked.updates, rows=120, effective=asked.rows)
        work = prepare(ROOT / "examples" / "train.jsonl", cache, Path(temporary), scale)
        for name in asked.only:
            lines[name] = measure(name, work, Path(temporary) / name)
            print(name, json.dumps(lines[name]), flush=True)
    if set(lines) == set(APPROACHES):
        found = head("veritune tuning methods benchmark", "benchmarks.tuning_methods")
        RESULTS.write_text(json.dumps(found | {"tuning methods": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
