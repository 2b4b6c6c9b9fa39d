"""Creates the resources that the documentation's examples name, over HTTP like any client.

Each is created once: a second `veritune demo` over the same state finds it.
"""

from pathlib import Path
from typing import Any

import httpx

from app.cli.client import ok

DEMO = "demo"
LATER = "demo-later"
LATER_ROWS = 24
SPEC: dict[str, Any] = {
    "dataset": DEMO,
    "adapter": {"type": "lora", "r": 16},
    "quantization": {"bits": 4},
    "trainer": {"train_steps": 30, "effective_batch_size": 8, "learning_rate": 5e-4, "verdict_branch": 0.5},
    "seed": 42,
}
CLAIM = "The Danube flows into the Black Sea."


def upload(client: httpx.Client, route: str, name: str, filename: str, content: bytes) -> dict[str, Any]:
    known = client.get(f"{route}/{name}")
    if known.is_success:
        return ok(known)
    return ok(client.post(route, files={"file": (filename, content)}, data={"name": name}))


def demo_spec(client: httpx.Client) -> dict[str, Any]:
    """The spec of the demo's job over the default base. It is named `demo`, unless a job or an adapter is already."""
    taken = any(client.get(f"/{resource}/{DEMO}").is_success for resource in ("jobs", "adapters"))
    return SPEC if taken else SPEC | {"name": DEMO}


def leave_paused(client: httpx.Client, train: Path) -> dict[str, Any]:
    """The job `demo-later`, for pause, resume and cancel. Called while the trainer is busy, it never trains."""
    known = client.get(f"/jobs/{LATER}")
    job = ok(known) if known.is_success else _submit_later(client, train)
    if job["status"] in ("queued", "running"):
        job = ok(client.post(f"/jobs/{LATER}/pause"))
    return job


def _submit_later(client: httpx.Client, train: Path) -> dict[str, Any]:
    # It gets a dataset of its own: an unfinished job blocks the deletion of its dataset, and `demo` must stay free.
    rows = b"".join(train.read_bytes().splitlines(keepends=True)[:LATER_ROWS])
    dataset = upload(client, "/datasets", LATER, f"{LATER}.jsonl", rows)
    return ok(client.post("/jobs", json=SPEC | {"name": LATER, "dataset": dataset["id"]}))


def store_prediction(client: httpx.Client, corpus: str) -> dict[str, Any]:
    """A stored prediction named `demo`."""
    known = client.get(f"/predictions/{DEMO}")
    if known.is_success:
        return ok(known)
    return ok(client.post("/predict", json={"claim": CLAIM, "corpus": corpus, "store": True, "name": DEMO}))
