"""Measures the time from POST /jobs to the first update, split by the job's events."""

import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.deployment import BenchmarkError, Deployment
from benchmarks.machine import timed_python
from benchmarks.starting import GPU_IMPORTS

SPEC: dict[str, Any] = {
    "dataset": "bench",
    "base_model": "smollm2-135m",
    "adapter": {"type": "lora", "r": 16},
    "quantization": {"bits": 4},
    "trainer": {"train_steps": 1, "effective_batch_size": 8, "learning_rate": 1e-3},
}
"""The demo's job, with one update."""

LOOK_SECONDS = 0.02
PATIENCE_SECONDS = 120.0


def to_first_update(deployment: Deployment, cache: Path, times: int) -> dict[str, Any]:
    """Run jobs in sequence. Between them, measure the limit: importing the libraries and loading the weights."""
    digest = next(m["digest"] for m in deployment.get("/base-models")["data"] if m["name"] == SPEC["base_model"])
    weights = str(cache / "models" / digest)
    load = f"{GPU_IMPORTS}; transformers.AutoModelForCausalLM.from_pretrained({weights!r}, dtype=torch.bfloat16)"
    jobs, limits = [], []
    for _ in range(times):
        jobs.append(_one(deployment))
        limits.append(round(timed_python(load), 2))
    return {"spec": SPEC, "jobs": jobs, "import_and_load_seconds": limits}


def _one(deployment: Deployment) -> dict[str, float]:
    posted = time.time()
    job = deployment.post("/jobs", json=SPEC)["id"]
    answered = time.time()
    while not (deployment.get(f"/jobs/{job}")["progress"] or {}).get("update"):
        if time.time() - posted > PATIENCE_SECONDS:
            raise BenchmarkError(f"{job} has no update after {PATIENCE_SECONDS} s\n{deployment.tail()}")
        time.sleep(LOOK_SECONDS)
    seen = time.time()
    deployment.until(job, "succeeded")
    ended = time.time()
    at = {event["kind"]: _seconds(event["at"]) for event in deployment.get(f"/jobs/{job}/events")["data"]}
    first = deployment.get(f"/jobs/{job}/metrics")["data"][0]
    return {
        "post_answered": round(answered - posted, 3),
        "queued_to_started": round(at["started"] - at["queued"], 3),
        "started_to_training": round(at["training"] - at["started"], 3),
        "training_to_first_update_seen": round(seen - at["training"], 3),
        "of_which_the_update_computed": round(first["seconds"], 3),
        "first_update_tokens": first["tokens"],
        "total": round(seen - posted, 3),
        "total_to_succeeded": round(ended - posted, 3),
    }


def _seconds(told: str) -> float:
    return datetime.fromisoformat(told).timestamp()
