"""`python -m benchmarks.service`: the whole service on loopback, measured against peers and limits in the same run.

    --quick        small counts, nothing kept: to see that everything runs
    --cache DIR    where the converted base model lies (VERITUNE_CACHE)

Prints ratios and writes `benchmarks/results/service.json` with every raw figure. `docs/benchmarks.md` reads them.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.deployment import Deployment
from benchmarks.first_update import to_first_update
from benchmarks.machine import MIB, ROOT, busy, head
from benchmarks.polling import medians, polling
from benchmarks.starting import importing, to_ready
from benchmarks.upload import uploading

RESULTS = ROOT / "benchmarks" / "results" / "service.json"
LIMIT_MIB = 200


@dataclass(frozen=True, slots=True)
class Counts:
    """How much is measured. `seconds`: duration of one polling round."""

    times: int = 3
    clients: int = 200
    seconds: float = 6.0
    rounds: int = 3
    sizes_mb: tuple[int, ...] = (20, 200)


QUICK = Counts(times=1, clients=20, seconds=1.5, rounds=1, sizes_mb=(2, 10))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    default = os.environ.get("VERITUNE_CACHE", str(ROOT / ".cache" / "veritune"))
    parser.add_argument("--cache", type=Path, default=Path(default))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # raises SystemExit, so that started processes are stopped
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="veritune-bench-") as directory:
        figures = measure(Path(directory), given.cache.resolve(), QUICK if given.quick else Counts())
    found = ratios(figures)
    result = head("veritune service benchmark", "benchmarks.service") | {
        "seconds": round(time.monotonic() - began, 1),
        "ratios": found,
        "figures": figures,
    }
    if given.quick:
        print(json.dumps(figures, indent=1))
    else:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, value in found.items():
        print(f"{value:10.3f}  {name}")


def measure(directory: Path, cache: Path, counts: Counts) -> dict[str, Any]:
    """Measure all figures. Before each part, note the machine's load by other work."""
    figures: dict[str, Any] = {"other_work": {"importing": busy()}}
    figures["importing"] = _step("importing", importing, counts.times)
    figures["other_work"]["starting"] = busy()
    figures["starting"], deployment = _step("starting", to_ready, directory / "home", cache, counts.times)
    try:
        figures |= _measure_running(deployment, figures["other_work"], directory, cache, counts)
    finally:
        deployment.stop()
    return figures


def _measure_running(
    deployment: Deployment, other: dict[str, Any], directory: Path, cache: Path, counts: Counts
) -> dict[str, Any]:
    figures: dict[str, Any] = {"api_mib": {"after_start": _api_mib(deployment)}}
    with (ROOT / "examples" / "train.jsonl").open("rb") as file:
        deployment.post("/datasets", files={"file": ("train.jsonl", file)}, data={"name": "bench"})
    other["first_update"] = busy()
    figures["first_update"] = _step("first update", to_first_update, deployment, cache, counts.times)
    other["polling"] = busy()
    figures["polling"] = _step("polling", polling, deployment, directory, counts.clients, counts.seconds, counts.rounds)
    figures["api_mib"]["after_polling"] = _api_mib(deployment)
    other["uploading"] = busy()
    figures["uploading"] = _step("uploading", uploading, deployment, directory, counts.sizes_mb)
    figures["api_mib"]["after_uploads"] = _api_mib(deployment)
    return figures


def _step(name: str, work: Any, *arguments: Any) -> Any:
    print(f"{name} … ", end="", flush=True)
    began = time.monotonic()
    figures = work(*arguments)
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    return figures


def _api_mib(deployment: Deployment) -> float:
    return round(psutil.Process(deployment.pid("app.cli", "api")).memory_info().rss / MIB, 1)


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Ours over the peer's or the limit's, from medians. Throughput: more is better; all others: less is better."""
    starting, polled, first = figures["starting"], figures["polling"], figures["first_update"]
    imports = figures["importing"]
    found = {
        "import app.main / import its libraries": median(imports["import_app_main_seconds"])
        / median(imports["import_its_libraries_seconds"]),
        "up to ready / import of the GPU libraries": starting["ready_seconds"]
        / median(starting["import_gpu_libraries_seconds"]),
        "POST to first update / import and load": median(job["total"] for job in first["jobs"])
        / median(first["import_and_load_seconds"]),
    }
    found |= {f"API memory {when} / {LIMIT_MIB} MiB": mib / LIMIT_MIB for when, mib in figures["api_mib"].items()}
    for setting in ("idle_fast", "training_fast", "training_paced"):
        ours = medians(polled[setting]["veritune"])
        for peer in sorted(polled[setting].keys() - {"veritune"}):
            theirs = medians(polled[setting][peer])
            keys = ours.keys() - ({"per_second"} if setting == "training_paced" else set())
            found |= {f"polling {setting} {key} / {peer}": ours[key] / theirs[key] for key in sorted(keys)}
    return {name: round(value, 3) for name, value in (found | _upload_ratios(figures["uploading"])).items()}


def _upload_ratios(uploads: list[dict[str, Any]]) -> dict[str, float]:
    small, large = uploads[0], uploads[-1]
    growth = (large["api_peak_mib"] - large["api_before_mib"]) * MIB
    return {
        "upload seconds / json.loads of its lines": large["seconds"] / large["json_loads_seconds"],
        "upload API peak growth / file": growth / (large["file_mb"] * 1e6),
        "upload API peak, large / small": large["api_peak_mib"] / small["api_peak_mib"],
        "upload child peak, large / small": large["child_peak_mib"] / small["child_peak_mib"],
    }


if __name__ == "__main__":
    main()
