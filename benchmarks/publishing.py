"""Prepares the inference benchmark: adapters that jobs train on the real trajectories, and a corpus.

The state stays in `.cache/bench-inference`, so the adapters are trained once.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.deployment import Deployment
from benchmarks.machine import ROOT

KEPT = ROOT / ".cache" / "bench-inference"
ADAPTERS = ("bench-0", "bench-1", "bench-2", "bench-3")
CORPUS = "bench"
RANK = 8
LIVE = 16

FIRST: dict[str, Any] = {
    "dataset": "bench",
    "adapter": {"type": "lora", "r": RANK},
    "trainer": {"train_steps": 24, "effective_batch_size": 16, "learning_rate": 1e-3},
}
"""Enough for Thoughts as short as those of the rows."""

LATER: dict[str, Any] = FIRST | {
    "adapter": {"type": "lora", "r": RANK, "pretrained_adapter_weights": ADAPTERS[0]},
    "trainer": {"train_steps": 2, "effective_batch_size": 16, "learning_rate": 3e-4},
}
"""The others begin where the first one ended."""


@dataclass(frozen=True, slots=True)
class Published:
    """`digests`: of the four adapters. `adapters`: the folder that publishing filled. `base`: the directory of the
    served base, named by its digest, as plain weights."""

    home: Path
    digests: tuple[str, ...]
    base: Path
    adapters: Path


def published(data: Path, cache: Path) -> Published:
    """Return the deployment's state; create it if it does not exist."""
    home = KEPT / "home"
    deployment = Deployment(home, cache)
    try:
        rows = deployment.client.get("/datasets/bench")
        if not rows.is_success:
            _upload(deployment, data)
        for seed, name in enumerate(ADAPTERS):
            if not deployment.client.get(f"/adapters/{name}").is_success:
                job = deployment.post("/jobs", json=(LATER if seed else FIRST) | {"name": name, "seed": seed})
                deployment.until(job["id"], "succeeded", seconds=900)
        found = [deployment.get(f"/adapters/{name}") for name in ADAPTERS]
    finally:
        deployment.stop()
    base = _exported(home, cache, found[0]["base_model"])
    return Published(home, tuple(row["digest"] for row in found), base, cache / "adapters")


def _exported(home: Path, cache: Path, name: str) -> Path:
    own = {"VERITUNE_HOME": str(home), "VERITUNE_CACHE": str(cache)}
    command = [sys.executable, "-m", "app.cli", "models", "export", name, "--to", str(KEPT / "bases")]
    done = subprocess.run(command, check=True, env=os.environ | own, cwd=ROOT, capture_output=True, text=True)
    return Path(done.stdout.split()[-1])


def _upload(deployment: Deployment, data: Path) -> None:
    with (data / "react_fever_270.csv").open("rb") as file:
        deployment.post("/datasets", files={"file": ("rows.csv", file, "text/csv")}, data={"name": "bench"})
    pages = (data / "fever_pages.jsonl").read_bytes() + (data / "wiki_leads.jsonl").read_bytes()
    deployment.post("/corpora", files={"file": ("pages.jsonl", pages)}, data={"name": CORPUS})


def many(found: Published, names: Sequence[str]) -> Path:
    """As many adapters as `names`, none like another: the trained ones, their weight a little different each time."""
    folder = KEPT / "adapters"
    for number, name in enumerate(names):
        directory, digest = folder / name, found.digests[number % len(found.digests)]
        if (directory / "source").exists() and (directory / "source").read_text() == digest:
            continue
        directory.mkdir(parents=True, exist_ok=True)
        own = found.adapters / digest
        weights = load_file(own / "adapter_model.safetensors")
        scale = 1 + 0.05 * (number // len(found.digests))
        changed = {key: value * scale if "lora_B" in key else value for key, value in weights.items()}
        save_file({key: value.to(torch.float32) for key, value in changed.items()}, directory / own_weights(own))
        (directory / "adapter_config.json").write_bytes((own / "adapter_config.json").read_bytes())
        (directory / "source").write_text(digest)
    return folder


def own_weights(directory: Path) -> str:
    """The name of the weights file."""
    return next(path.name for path in directory.iterdir() if path.suffix == ".safetensors")
