"""Measures start times: importing the API, and `veritune up` until it is ready."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.deployment import Deployment
from benchmarks.machine import ROOT, timed_python

BARE_IMPORTS = "import fastapi, pydantic_settings, sqlalchemy.orm, celery, pyarrow, tokenizers, obstore, httpx"
GPU_IMPORTS = "import torch, transformers, peft, bitsandbytes"
HEAVY = ("torch", "transformers", "peft", "bitsandbytes")


def importing(times: int) -> dict[str, Any]:
    """`import app.main` against importing only the libraries that it uses, in alternation."""
    ask = "import app.main, sys, json; print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(json.loads(done.stdout))
    ours, bare = [], []
    for _ in range(times):
        ours.append(round(timed_python("import app.main"), 2))
        bare.append(round(timed_python(BARE_IMPORTS), 2))
    return {
        "heavy_modules_loaded": [name for name in HEAVY if name in loaded],
        "import_app_main_seconds": ours,
        "import_its_libraries_seconds": bare,
    }


def to_ready(home: Path, cache: Path, times: int) -> tuple[dict[str, Any], Deployment]:
    """A new home over a warm cache, then `times` more starts over the same home; the last one is left running.

    The limit is importing the libraries of the GPU side once, which inference has to do before it is ready.
    """
    limits = []
    deployment = Deployment(home, cache)
    first, again = deployment.marks, []
    for _ in range(times):
        deployment.stop()
        limits.append(round(timed_python(GPU_IMPORTS), 2))
        deployment = Deployment(home, cache)
        again.append(deployment.marks)
    return {
        "first_start_of_a_home": first,
        "later_starts": again,
        "import_gpu_libraries_seconds": limits,
        "ready_seconds": median(marks["ready"] for marks in again),
    }, deployment
