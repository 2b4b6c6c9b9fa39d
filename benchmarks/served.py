"""`python -m benchmarks.served`: measures the time from a job's success to its adapter's first prediction.

    --times N      jobs; the first one's adapter is also the first thing that inference is asked for
    --cache DIR    where the converted base model lies (VERITUNE_CACHE)

Prints the timeline of each, and writes `benchmarks/results/served.json`.
"""

import argparse
import json
import os
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.deployment import BenchmarkError, Deployment
from benchmarks.first_update import SPEC
from benchmarks.machine import ROOT, head

RESULTS = ROOT / "benchmarks" / "results" / "served.json"
CLAIM = "The examples' corpus says so."


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=3)
    cache = os.environ.get("VERITUNE_CACHE", str(ROOT / ".cache" / "veritune"))
    parser.add_argument("--cache", type=Path, default=Path(cache))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="veritune-bench-") as directory:
        deployment = Deployment(Path(directory) / "home", given.cache.resolve())
        try:
            timelines = _measure(deployment, given.times)
        finally:
            deployment.stop()
    what = "from a job's success to the first answer of its adapter; seconds after the job succeeded"
    result = head(what, "benchmarks.served") | {"timelines": timelines}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for timeline in timelines:
        print(json.dumps(timeline))


def _measure(deployment: Deployment, times: int) -> list[dict[str, float]]:
    for what, name in (("datasets", "train.jsonl"), ("corpora", "corpus.jsonl")):
        with (ROOT / "examples" / name).open("rb") as file:
            deployment.post(f"/{what}", files={"file": (name, file)}, data={"name": "bench"})
    return [_timeline(deployment, seed) for seed in range(times)]


def _timeline(deployment: Deployment, seed: int) -> dict[str, float]:
    """Seconds after the moment of the `succeeded` event, as the events' stream and the prediction's tell them."""
    job = deployment.post("/jobs", json=SPEC | {"seed": seed})["id"]
    succeeded = _succeeded(deployment, job)
    told = time.time()
    adapter = deployment.get(f"/jobs/{job}")["adapter_id"]
    body = {"claim": CLAIM, "adapter": adapter, "corpus": "bench", "stream": True}
    seen: dict[str, float] = {}
    with deployment.client.stream("POST", "/predict", json=body) as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                seen.setdefault(line.removeprefix("event: "), time.time())
    if "prediction" not in seen:
        raise BenchmarkError(f"no prediction came: {seen}")
    return {
        "success_told": round(told - succeeded, 3),
        "first_thought": round(seen["thought"] - succeeded, 3),
        "whole_answer": round(seen["prediction"] - succeeded, 3),
    }


def _succeeded(deployment: Deployment, job: str) -> float:
    """Wait for the job's `succeeded` event; return its timestamp."""
    headers = {"Accept": "text/event-stream"}
    with deployment.client.stream("GET", f"/jobs/{job}/events", headers=headers) as stream:
        for line in stream.iter_lines():
            event: Any = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if event.get("kind") == "succeeded":
                return datetime.fromisoformat(event["at"]).timestamp()
            if event.get("kind") == "failed":
                raise BenchmarkError(str(event))
    raise BenchmarkError("the stream of events ended before the job")


if __name__ == "__main__":
    main()
