"""Veritune as a contender: the real training child with a work order, read from its events.

python -m benchmarks.veritune_run     the same child, with the base kept in 4 bits however small it is
"""

import sys
from pathlib import Path
from statistics import median
from typing import Any

from app.domain import memory
from benchmarks.contender import Run, adapter_digest, environment, run
from benchmarks.encoded import Work
from worker.environment import TENSORS

CHILD = "worker.training"
PACKED_CHILD = "benchmarks.veritune_run"


def veritune(work: Work, directory: Path, threads: int, *, packed: bool = False) -> dict[str, Any]:
    """Run Veritune once. `packed`: without the dequantised copy that a small base gets on a CPU."""
    directory.mkdir(parents=True)
    module = PACKED_CHILD if packed else CHILD
    order = work.order(directory).model_dump_json() + "\n"
    done = run([sys.executable, "-m", module], environment(TENSORS, threads), order)
    return _figures(done, directory / "adapter")


def _figures(done: Run, adapter: Path) -> dict[str, Any]:
    checking, loading = done.first("event", "log"), done.first("message", "loading and quantising base model")
    started, first = done.first("event", "started"), done.first("event", "metrics")
    updates = [line.told for line in done.lines if line.told["event"] == "metrics"]
    at = [done.lines[place].at for place in (checking, loading, started, first)]
    return {
        "precision": done.lines[started].told["precision"],
        "updates": [{key: update[key] for key in ("tokens", "seconds", "loss")} for update in updates],
        "tokens_per_second": median_pace(updates),
        "memory": done.memory(checking, started),
        "start_up": {
            "imports": at[0],
            "weights_checked": round(at[1] - at[0], 3),
            "loaded_quantised_adapted": round(at[2] - at[1], 3),
            "first_update": round(at[3] - at[2], 3),
            "total": at[3],
        },
        "seconds": done.seconds,
        "adapter": str(adapter),
        "adapter_digest": adapter_digest(adapter),
    }


def median_pace(updates: list[dict[str, Any]]) -> float:
    """Real tokens per second: the median over all updates but the first, which is a warm-up."""
    counted = updates[1:] or updates
    return round(median(float(update["tokens"] / update["seconds"]) for update in counted), 1)


def _packed() -> int:
    from worker.training import __main__ as child

    memory.KEEP_DEQUANTIZED_UP_TO = 0
    return child.main()


if __name__ == "__main__":
    sys.exit(_packed())
