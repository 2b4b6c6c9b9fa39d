"""TRL as a contender: its venv, its configurations, and one run, read from its JSON lines."""

import json
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contender import adapter_digest, environment, run
from benchmarks.encoded import Work
from benchmarks.machine import ROOT
from benchmarks.veritune_run import median_pace
from worker.environment import TENSORS

TRL = "trl==1.16.0"
ROWS_AT_ONCE = 4

PLAIN = {"activation_checkpointing": False}


@dataclass(frozen=True, slots=True)
class Way:
    """How TRL is set. `options` go to SFTConfig, which keeps its defaults otherwise.

    `sorted`: each update's rows are handed over longest first, so that micro-batches pad little. `tuned`: with the
    environment that Veritune starts its child with.
    """

    dropout: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    rows_at_once: int = ROWS_AT_ONCE
    sorted: bool = False
    tuned: bool = False


DEFAULT = Way(dropout=0.05)
"""As SFTConfig comes, gradient checkpointing included, with the dropout of its examples."""

WAYS = {
    "dropout 0": Way(),
    "without checkpointing": Way(options=PLAIN),
    "longest first": Way(options=PLAIN, sorted=True),
    "group_by_length": Way(options=PLAIN | {"train_sampling_strategy": "group_by_length"}),
    "batch_rebalance": Way(options=PLAIN | {"train_sampling_strategy": "batch_rebalance"}),
    "padding_free": Way(options=PLAIN | {"padding_free": True}),
    "one row at once": Way(options=PLAIN, rows_at_once=1),
}
"""What may be its best, all at dropout 0 and each against padding in its own way."""

TUNED = "longest first, with Veritune's environment"
EXTRA = {TUNED: Way(options=PLAIN, sorted=True, tuned=True)}
"""Measured for what it tells, and not counted as TRL's: its users do not have it."""


def trl_python() -> Path:
    """The interpreter of TRL's venv, which is made the first time. It borrows what is here in the same versions."""
    venv = ROOT / ".cache" / "bench-trl"
    python = venv / "bin" / "python"
    if not (venv / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        ours = sysconfig.get_paths()["purelib"]
        site = next((venv / "lib").glob("python*")) / "site-packages"
        (site / "veritune.pth").write_text(f"{ours}\n", encoding="utf-8")
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([str(python), *install, "-c", str(ROOT / "constraints.txt"), TRL], check=True)
        (venv / ".ready").touch()
    return python


def trl(
    work: Work, way: Way, directory: Path, threads: int, *, bf16: bool, updates: int | None = None
) -> dict[str, Any]:
    """Run TRL once. `updates`: run only the first of the schedule's updates."""
    directory.mkdir(parents=True)
    task = directory / "task.json"
    task.write_text(json.dumps(_task(work, way, directory, threads, bf16, updates)), encoding="utf-8")
    own = TENSORS if way.tuned else {"TOKENIZERS_PARALLELISM": "false"}
    command = [str(trl_python()), "-m", "benchmarks.trl_peer", str(task)]
    done = run(command, environment(own, threads))
    imported, loaded = done.first("mark", "imported"), done.first("mark", "loaded")
    told = [line.told for line in done.lines if line.told.get("mark") == "update"]
    return {
        "packages": done.lines[imported].told["packages"],
        "precision": done.lines[loaded].told["computes_in"],
        "updates": [{key: update[key] for key in ("tokens", "seconds", "loss")} for update in told],
        "tokens_per_second": median_pace(told),
        "memory": done.memory(imported, loaded),
        "start_up": {"imports": done.lines[imported].at, "loaded": done.lines[loaded].at},
        "seconds": done.seconds,
        "adapter": str(directory / "adapter"),
        "adapter_digest": adapter_digest(directory / "adapter"),
    }


def _task(work: Work, way: Way, directory: Path, threads: int, bf16: bool, updates: int | None) -> dict[str, Any]:
    spec, schedule = work.spec, work.schedule
    at_once = min(way.rows_at_once, schedule.rows_per_update)
    strategy = way.options.get("train_sampling_strategy", "sequential")
    return {
        "base": str(work.base.path),
        "rows": str(work.rows),
        "order": _order(work, way) if strategy == "sequential" else list(range(schedule.rows)),
        "updates": updates or schedule.updates,
        "learning_rate": spec.trainer.learning_rate,
        "seed": spec.seed,
        "bf16": bf16,
        "threads": threads,
        "r": 8,
        "alpha": 16,
        "dropout": way.dropout,
        "output": str(directory / "output"),
        "adapter": str(directory / "adapter"),
        "options": {
            "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": schedule.rows_per_update // at_once,
            "train_sampling_strategy": strategy,
            **way.options,
        },
    }


def _order(work: Work, way: Way) -> list[int]:
    def length(place: int) -> int:
        return -len(work.chosen[place].ids)

    updates = work.rows_by_update()
    return [place for update in updates for place in (sorted(update, key=length) if way.sorted else update)]
