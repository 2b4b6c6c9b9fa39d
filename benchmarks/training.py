"""`python -m benchmarks.training`: an update's speed and memory, against TRL and against the limit, in the same run.

    --updates N --rounds N    how much is trained, and how often by whom
    --quick                   4 rows, 2 updates, one round, nothing kept: to see that everything runs
    --csv FILE --cache DIR    the real trajectories, and where the converted base model lies (VERITUNE_CACHE)
    --table                   print the markdown table of the kept results, and measure nothing

Prints ratios and writes `benchmarks/results/training.json` with every raw figure. `docs/benchmarks.md` reads them.
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

import torch

from benchmarks.contender import environment, run
from benchmarks.deployment import BenchmarkError
from benchmarks.encoded import Scale, Work, dataset, prepare
from benchmarks.machine import ROOT, busy, head
from benchmarks.packing import filling, scaling
from benchmarks.training_ratios import ratios, table
from benchmarks.trl_run import DEFAULT, EXTRA, TUNED, WAYS, Way, trl
from benchmarks.veritune_run import median_pace, veritune
from worker.environment import TENSORS
from worker.precision import precision_here

RESULTS = ROOT / "benchmarks" / "results" / "training.json"
THREADS = 2
SHORT_UPDATES = 4
"""Updates by which TRL's ways are compared; the first does not count. Where a way groups rows by length, its updates
are of very different pace."""

REFERENCE = "without checkpointing"
QUICK_WAYS = (REFERENCE, TUNED)

CLOSE_LOSS = 0.02
"""A way of TRL's whose first loss is further off than this share does not train the same."""


@dataclass(frozen=True, slots=True)
class Bench:
    """The settings and paths that all parts of the benchmark use."""

    work: Work
    directory: Path
    compute: torch.dtype
    rounds: int
    ways: dict[str, Way]

    @property
    def bf16(self) -> bool:
        return self.compute is torch.bfloat16

    def trl(self, way: Way, name: str, updates: int | None = None) -> dict[str, Any]:
        place = self.directory / name.replace(" ", "-")
        return trl(self.work, way, place, THREADS, bf16=self.bf16, updates=updates)


def main() -> None:
    given = _arguments()
    if given.table:
        print(table(json.loads(RESULTS.read_text("utf-8"))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # raises SystemExit, so that started processes are stopped
    began = time.monotonic()
    scale = Scale(updates=2, rows=4, effective=2) if given.quick else Scale(updates=given.updates)
    with tempfile.TemporaryDirectory(prefix="veritune-bench-") as name:
        directory = Path(name)
        work = prepare(given.csv or dataset(), given.cache.resolve(), directory, scale)
        compute = precision_here(torch.device("cpu"), work.base.fp16).compute
        ways = {name: way for name, way in (WAYS | EXTRA).items() if not given.quick or name in QUICK_WAYS}
        figures = measure(Bench(work, directory, compute, 1 if given.quick else given.rounds, ways))
    result = _result(figures, scale, work, time.monotonic() - began)
    if given.quick:
        print(json.dumps(result, indent=1))
    else:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for ratio, value in result["ratios"].items():
        print(f"{value:10.3f}  {ratio}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--csv", type=Path)
    default = os.environ.get("VERITUNE_CACHE", str(ROOT / ".cache" / "veritune"))
    parser.add_argument("--cache", type=Path, default=Path(default))
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def _result(figures: dict[str, Any], scale: Scale, work: Work, seconds: float) -> dict[str, Any]:
    return head("veritune training benchmark", "benchmarks.training") | {
        "threads": THREADS,
        "seconds": round(seconds, 1),
        "work": {
            "rows": scale.rows,
            "tokens": sum(len(row.ids) for row in work.chosen),
            "updates": scale.updates,
            "rows_per_update": scale.effective,
            "spec": work.spec.model_dump(mode="json"),
            "schedule": work.schedule.model_dump(mode="json"),
        },
        "ratios": ratios(figures),
        "figures": figures,
    }


def measure(bench: Bench) -> dict[str, Any]:
    """Measure all figures. Before each part, note the machine's load by other work."""
    other: dict[str, Any] = {}
    figures: dict[str, Any] = {"other_work": other}
    other["counting"] = busy()
    figures["filling"] = filling(bench.work.every, bench.work.spec)
    figures["scaling"] = scaling(bench.work.chosen, bench.work.spec, _config(bench.work)["vocab_size"])
    other["trl_ways"] = busy()
    figures["trl_ways"] = _ways(bench)
    figures["trl_best_way"] = best = _best(figures["trl_ways"])
    figures["rounds"] = []
    for number in range(1, bench.rounds + 1):
        other[f"round_{number}"] = busy()
        figures["rounds"].append(_round(bench, number, WAYS[best]))
    other["rest"] = busy()
    figures["profile"] = _step("profile", _profile, bench)
    figures["profile_packed"] = _step("profile, base in 4 bits", _profile, bench, "packed")
    figures["losses"] = _step("losses", _losses, bench, figures["rounds"])
    for told in [*figures["trl_ways"].values(), *(told for r in figures["rounds"] for told in r.values())]:
        told.pop("adapter", None)  # its directory is deleted by the time this is read
    return figures


def _step(name: str, work: Any, *arguments: Any, **named: Any) -> Any:
    print(f"{name} … ", end="", flush=True)
    began = time.monotonic()
    figures = work(*arguments, **named)
    pace = f", {figures['tokens_per_second']} tokens/s" if "tokens_per_second" in figures else ""
    print(f"{time.monotonic() - began:.0f} s{pace}", flush=True)
    return figures


def _ways(bench: Bench) -> dict[str, Any]:
    """Run a few updates of each TRL configuration."""
    found = {}
    for name, way in bench.ways.items():
        try:
            found[name] = _step(f"TRL, {name}", bench.trl, way, f"way {name}", updates=SHORT_UPDATES)
        except BenchmarkError as error:
            if name in (REFERENCE, TUNED):
                raise
            print("failed", flush=True)
            found[name] = {"correct": False, "error": str(error).splitlines()[-1]}
    reference = found[REFERENCE]["updates"][0]["loss"]
    for name, figures in found.items():
        if "error" in figures:
            continue
        comparable = "train_sampling_strategy" not in bench.ways[name].options
        off = abs(figures["updates"][0]["loss"] / reference - 1)
        figures["first_loss_off"] = round(off, 5) if comparable else None
        figures["correct"] = not comparable or off <= CLOSE_LOSS
    return found


def _best(ways: dict[str, Any]) -> str:
    fitting = [name for name in ways if name not in EXTRA and ways[name]["correct"]]
    return max(fitting, key=lambda name: float(ways[name]["tokens_per_second"]))


def _round(bench: Bench, number: int, best: Way) -> dict[str, Any]:
    """Run every contender once, in sequence."""
    place = bench.directory / f"round-{number}"
    return {
        "veritune": _step("Veritune", veritune, bench.work, place / "veritune", THREADS),
        "trl_default": _step("TRL, default", bench.trl, DEFAULT, f"default {number}"),
        "trl_best": _step("TRL, best", bench.trl, best, f"best {number}"),
        "limit": _step("limit", _limit, bench),
        "veritune_packed": _step(
            "Veritune, base in 4 bits", veritune, bench.work, place / "packed", THREADS, packed=True
        ),
    }


def _limit(bench: Bench) -> dict[str, Any]:
    shapes = bench.directory / "shapes.json"
    shapes.write_text(json.dumps(bench.work.shapes()), encoding="utf-8")
    config, dtype = bench.work.base.path / "config.json", str(bench.compute).removeprefix("torch.")
    command = [sys.executable, "-m", "benchmarks.limit", str(config), str(shapes), "8", dtype]
    told = [line.told for line in run(command, environment(TENSORS, THREADS)).lines]
    gflops = median(update["operations"] / update["seconds"] for update in told) / 1e9
    return {"updates": told, "tokens_per_second": median_pace(told), "gflop_per_second": round(gflops, 1)}


def _profile(bench: Bench, *words: str) -> dict[str, Any]:
    order = bench.directory / "profiled.json"
    order.write_text(bench.work.order(bench.directory).model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.profiling", str(order), *words]
    return run(command, environment(TENSORS, THREADS)).lines[-1].told


def _losses(bench: Bench, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean loss under every adapter: runs that gave the same bytes are evaluated once."""
    runs = [(f"{name} {number}", r[name]) for number, r in enumerate(rounds, 1) for name in r if "adapter" in r[name]]
    paths = {figures["adapter_digest"]: figures["adapter"] for _, figures in runs}
    command = [sys.executable, "-m", "benchmarks.evaluator", str(bench.work.base.path), str(bench.work.rows)]
    done = run([*command, "", *paths.values()], environment(TENSORS, THREADS))
    losses = {line.told["adapter"]: round(line.told["loss"], 5) for line in done.lines}
    return {"base": losses[""]} | {name: losses[paths[figures["adapter_digest"]]] for name, figures in runs}


def _config(work: Work) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((work.base.path / "config.json").read_text("utf-8"))
    return config


if __name__ == "__main__":
    main()
